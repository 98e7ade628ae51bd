//! The module path of a linear layer (`bert.encoder.layer.0.attention.self.query`), which an ONNX file does not
//! store as such: the rules below read it from what exporters leave behind, the surest first. Each was found on
//! exports of torch 1.11 to 2.15 and checked against the modules' weight values; where two clues disagree, no rule
//! guesses.

/// Which clue gave the path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum NameRule {
    /// `pkg.torch.onnx.name_scopes` of the node, or of the bias Add after it.
    Metadata,
    /// The weight's own name, `<path>.weight`.
    Weight,
    /// The bias's name, `<path>.bias`, which agrees with the node's.
    BiasAndNode,
    /// The node's scoped name, `/a/b/MatMul`.
    Node,
    /// A further call of a module: the same weight, and a node name that differs only in `_1`, `_2`, ….
    Call,
    /// The bias's name alone.
    Bias,
    /// Nothing is left in the file to read a path from.
    None,
}

impl NameRule {
    /// How sure a path is that this clue gave: `certain` where the file states it, `likely` where a name that can lose
    /// or repeat parts gave it, `guess` for a bias alone (exporters merge equal ones), `none` without a path.
    pub fn confidence(self) -> &'static str {
        match self {
            Self::Metadata | Self::Weight => "certain",
            Self::BiasAndNode | Self::Node | Self::Call => "likely",
            Self::Bias => "guess",
            Self::None => "none",
        }
    }

    /// The clue in a word or two.
    pub fn clue(self) -> &'static str {
        match self {
            Self::Metadata => "metadata",
            Self::Weight => "weight",
            Self::BiasAndNode => "bias and node",
            Self::Node => "node",
            Self::Call => "repeated call",
            Self::Bias => "bias",
            Self::None => "-",
        }
    }
}

/// What the file says about one linear layer.
#[derive(Debug, Clone, Default)]
pub struct Clues<'a> {
    pub node_name: &'a str,
    /// `pkg.torch.onnx.name_scopes` of the node, else of the Add that adds its bias.
    pub scopes: Option<&'a str>,
    /// Name of the stored matrix.
    pub weight: &'a str,
    /// How many linear layers read that matrix.
    pub weight_targets: usize,
    /// The matrix is looked up by a Gather too (tied embeddings).
    pub is_embedding: bool,
    /// Name of the one-dimensional bias.
    pub bias: Option<&'a str>,
    /// How many linear layers read that bias.
    pub bias_targets: usize,
    /// How many nodes of any kind read it.
    pub bias_uses: usize,
}

/// A path, where the clue is there.
type PathRule = fn(&Clues) -> Option<String>;

/// The rules, in the order they are asked.
const RULES: [(NameRule, PathRule); 5] = [
    (NameRule::Metadata, by_metadata),
    (NameRule::Weight, by_weight),
    (NameRule::BiasAndNode, by_bias_and_node),
    (NameRule::Node, by_node),
    (NameRule::Bias, by_bias),
];

/// The path, and the rule that gave it. [`NameRule::Call`] needs the other layers and is the caller's to find.
pub fn module_path(clues: &Clues) -> (Option<String>, NameRule) {
    RULES
        .iter()
        .find_map(|(rule, path)| path(clues).filter(|p| !p.is_empty()).map(|p| (Some(p), *rule)))
        .unwrap_or((None, NameRule::None))
}

/// The last scope but one: the last is the operator's own. `nn.MultiheadAttention` calls its `out_proj` without
/// entering it, so a weight that stands below the scope says more.
fn by_metadata(clues: &Clues) -> Option<String> {
    let scopes = python_strings(clues.scopes?)?;
    let scope = scopes.len().checked_sub(2).and_then(|i| scopes.get(i)).filter(|s| !s.is_empty())?;
    let below = weight_prefix(clues.weight)
        .filter(|w| clues.weight_targets == 1 && w.strip_prefix(scope.as_str()).is_some_and(|r| r.starts_with('.')));
    Some(below.map_or_else(|| scope.clone(), str::to_string))
}

fn by_weight(clues: &Clues) -> Option<String> {
    let prefix = weight_prefix(clues.weight)?;
    let node = by_node(clues);
    if clues.weight_targets != 1 && node.is_some() {
        return None;
    }
    // An embedding table that serves as the output layer as well bears the embedding's name.
    if clues.is_embedding && !node.is_some_and(|n| agrees(prefix, &n)) {
        return None;
    }
    Some(prefix.to_string())
}

/// Exporters merge equal tensors, so an all-zero bias often bears another module's name: it must agree.
fn by_bias_and_node(clues: &Clues) -> Option<String> {
    let prefix = bias_prefix(clues.bias?)?;
    let node = by_node(clues)?;
    (clues.bias_targets == 1 && agrees(prefix, &node)).then(|| prefix.to_string())
}

fn by_node(clues: &Clues) -> Option<String> {
    Some(fold(&scopes_of(clues.node_name)?))
}

fn by_bias(clues: &Clues) -> Option<String> {
    let prefix = bias_prefix(clues.bias?)?;
    (scopes_of(clues.node_name).is_none() && clues.bias_targets == 1 && clues.bias_uses == 1)
        .then(|| prefix.to_string())
}

/// The scopes in a TorchScript node name: `/a/b/MatMul_1` gives `a`, `b`. `None` where the name has none.
pub fn scopes_of(node_name: &str) -> Option<Vec<&str>> {
    let mut parts: Vec<&str> = node_name.strip_prefix('/')?.split('/').collect();
    parts.pop();
    // ONNX Runtime's fusions append to a name: `/a/b/MatMul/MatMulAddFusion`.
    while parts.last().is_some_and(|p| matches!(without_count(p), "MatMul" | "Gemm")) {
        parts.pop();
    }
    (!parts.is_empty() && parts.iter().all(|p| !p.is_empty())).then_some(parts)
}

/// Children of a `Sequential` repeat their parent: `net/net.1/net.1.1/inner/inner.0` is `net.1.1.inner.0`.
fn fold(parts: &[&str]) -> String {
    let mut folded: Vec<&str> = Vec::new();
    for part in parts {
        if folded.last().is_some_and(|last| part.strip_prefix(last).is_some_and(|rest| rest.starts_with('.'))) {
            folded.pop();
        }
        folded.push(part);
    }
    folded.join(".")
}

/// True where `call` is the scoped name of a further call of the module that `first` names: some scopes bear a
/// count (`_1`), all else is equal. Both as [`scopes_of`] gives them.
pub fn is_call_of(call: &[&str], first: &[&str]) -> bool {
    call != first && call.len() == first.len() && call.iter().zip(first).all(|(c, f)| c == f || without_count(c) == *f)
}

/// `path` is what the node's name says, or that with more in front (a `ModuleDict`'s name is lost).
fn agrees(path: &str, node: &str) -> bool {
    path == node || path.strip_suffix(node).is_some_and(|front| front.ends_with('.'))
}

/// `<path>` of `<path>.weight`, whatever a quantizer or a merge appended.
fn weight_prefix(name: &str) -> Option<&str> {
    let name = stored_name(name).strip_suffix(".weight")?;
    Some(name.strip_suffix(".MatMul").unwrap_or(name))
}

fn bias_prefix(name: &str) -> Option<&str> {
    let name = stored_name(name).strip_suffix(".bias")?;
    Some(name.strip_suffix(".Add").unwrap_or(name))
}

/// The name before tools changed it: `_quantized`, `_Q4`, `_Q8`, `_q` (quantizers) and `_merged_0` (optimum) go.
fn stored_name(mut name: &str) -> &str {
    loop {
        name = unmerged(name);
        match ["_quantized", "_Q4", "_Q8", "_q"].iter().find_map(|s| name.strip_suffix(s)) {
            Some(shorter) => name = shorter,
            None => return name,
        }
    }
}

/// `name` without optimum's `_merged_0`.
pub fn unmerged(name: &str) -> &str {
    let front = without_count(name);
    if front == name { name } else { front.strip_suffix("_merged").unwrap_or(name) }
}

/// `name` without a final `_<digits>`.
fn without_count(name: &str) -> &str {
    match name.rsplit_once('_') {
        Some((front, digits)) if !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()) => front,
        _ => name,
    }
}

/// The strings of a Python list literal (`['', 'a', "b'c"]`), as the exporter prints it; `None` where it is no such.
fn python_strings(text: &str) -> Option<Vec<String>> {
    let mut chars = text.trim().strip_prefix('[')?.strip_suffix(']')?.chars();
    let mut strings = Vec::new();
    loop {
        let quote = match chars.next() {
            None => return Some(strings),
            Some(c) if c == ',' || c.is_whitespace() => continue,
            Some(c @ ('\'' | '"')) => c,
            Some(_) => return None,
        };
        let mut string = String::new();
        loop {
            match chars.next()? {
                '\\' => string.push(chars.next()?),
                c if c == quote => break,
                c => string.push(c),
            }
        }
        strings.push(string);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clues(node_name: &'static str, weight: &'static str) -> Clues<'static> {
        Clues { node_name, weight, weight_targets: 1, ..Default::default() }
    }

    fn path(clues: &Clues) -> Option<String> {
        module_path(clues).0
    }

    #[test]
    fn scoped_names_fold_and_lose_their_leaf() {
        let cases = [
            ("/net/net.1/net.1.1/inner/inner.1/inner.1.1/MatMul", Some("net.1.1.inner.1.1")),
            ("/bert/encoder/layer.0/attention/self/query/MatMul_3", Some("bert.encoder.layer.0.attention.self.query")),
            ("/model/model.0/auto_model/MatMul_quant", Some("model.0.auto_model")),
            ("/net/net.10/MatMul", Some("net.10")),
            ("/net.1/net.10/MatMul", Some("net.1.net.10")),
            ("/lm_head/MatMul_Q4", Some("lm_head")),
            ("/a/b/MatMul/MatMulAddFusion", Some("a.b")),
            ("/MatMul", None),
            ("//MatMul", None),
            ("node_MatMul_3", None),
            ("model/dense/MatMul", None),
            ("", None),
        ];
        for (name, wanted) in cases {
            assert_eq!(path(&clues(name, "onnx::MatMul_1")).as_deref(), wanted, "{name}");
        }
    }

    #[test]
    fn weight_names_are_read_through_what_tools_append() {
        for weight in
            ["a.b.weight", "a.b.weight_quantized", "a.b.MatMul.weight_Q4", "a.b.weight_merged_0", "a.b.weight_q"]
        {
            assert_eq!(module_path(&clues("Gemm_1", weight)), (Some("a.b".into()), NameRule::Weight), "{weight}");
        }
        assert_eq!(path(&clues("x", "a.weight_hh")), None);
    }

    #[test]
    fn a_tied_embedding_does_not_name_the_output_layer() {
        let tied = Clues { is_embedding: true, ..clues("/lm_head/MatMul", "model.embed_tokens.weight") };
        assert_eq!(module_path(&tied), (Some("lm_head".into()), NameRule::Node));
        let agreeing = Clues { is_embedding: true, ..clues("/lm_head/MatMul", "lm_head.weight") };
        assert_eq!(module_path(&agreeing), (Some("lm_head".into()), NameRule::Weight));
        let nameless = Clues { is_embedding: true, ..clues("node_linear", "model.embed_tokens.weight") };
        assert_eq!(path(&nameless), None);
    }

    #[test]
    fn metadata_comes_first_and_the_weight_below_its_scope_says_more() {
        let scopes = Some("['', 'm', 'm.attn', 'linear_3']");
        let plain = Clues { scopes, ..clues("node_linear_3", "val_3") };
        assert_eq!(module_path(&plain), (Some("m.attn".into()), NameRule::Metadata));
        let out_proj = Clues { scopes, ..clues("node_linear_3", "m.attn.out_proj.weight") };
        assert_eq!(path(&out_proj).as_deref(), Some("m.attn.out_proj"));
        let similar = Clues { scopes, ..clues("node_linear_3", "m.attn2.weight") };
        assert_eq!(path(&similar).as_deref(), Some("m.attn"));
        // torch.cond: only the operator's own scope is left.
        let cond = Clues { scopes: Some("['linear']"), ..clues("node_linear", "rnn.weight_hh") };
        assert_eq!(module_path(&cond), (None, NameRule::None));
        for broken in ["", "[", "['a'", "[a, b]", "['a\\"] {
            assert_eq!(path(&Clues { scopes: Some(broken), ..clues("n", "w") }), None, "{broken}");
        }
    }

    #[test]
    fn a_bias_must_agree_with_the_node_and_serve_one_layer() {
        let bias = |node, bias, bias_targets, bias_uses| {
            module_path(&Clues { bias: Some(bias), bias_targets, bias_uses, ..clues(node, "onnx::MatMul_1") })
        };
        assert_eq!(bias("/a/MatMul", "dct.a.bias", 1, 1), (Some("dct.a".into()), NameRule::BiasAndNode));
        assert_eq!(bias("/b/a/MatMul", "ln.bias", 1, 2), (Some("b.a".into()), NameRule::Node));
        assert_eq!(bias("/a/MatMul", "dct.a.bias", 2, 2), (Some("a".into()), NameRule::Node));
        assert_eq!(bias("n", "q.bias_quantized", 1, 1), (Some("q".into()), NameRule::Bias));
        assert_eq!(bias("n", "ln.bias", 1, 2), (None, NameRule::None));
        assert_eq!(bias("n", "l.qkv_proj.Add.bias", 1, 1).0.as_deref(), Some("l.qkv_proj"));
    }

    #[test]
    fn further_calls_bear_a_count() {
        let call = |a, b| is_call_of(&scopes_of(a).unwrap(), &scopes_of(b).unwrap());
        assert!(call("/lin_1/MatMul_1", "/lin/MatMul"));
        assert!(call("/enc_1/enc.0_1/MatMul", "/enc/enc.0/MatMul"));
        assert!(!call("/lin/MatMul_1", "/lin/MatMul"));
        assert!(!call("/layers.0/lin/MatMul", "/layers.1/lin/MatMul"));
        assert!(!call("/lin/MatMul", "/lin_1/MatMul"));
    }
}
