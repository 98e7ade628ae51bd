//! Layers named by their nodes, for files that leave no module path.

use std::collections::BTreeSet;

use fancy_regex::{Regex, escape};

use super::Linear;
use super::kinds::listed;
use super::matching::{is_match, pattern};
use crate::adapter::TargetModules;
use crate::{Error, Result, did_you_mean};

/// `targets` (`None`: nothing) and the layers of the nodes that `nodes` names, as one pattern for `target_modules`: a
/// list names nodes in full, a regex matches whole names.
///
/// # Errors
/// A name that no linear layer's node has; `all-linear` beside it, which means every layer already.
pub fn with_nodes(linears: &[Linear], nodes: &TargetModules, targets: Option<&TargetModules>) -> Result<TargetModules> {
    let mut parts = match targets {
        None => Vec::new(),
        Some(all) if all.is_all_linear() => {
            return Err(Error::config("target_nodes beside all-linear says nothing more; leave one of them out"));
        }
        Some(TargetModules::Pattern(pattern)) => vec![format!("(?:{pattern})")],
        Some(TargetModules::List(names)) => names.iter().map(|n| format!(r"(?:.*\.)?{}", escape(n))).collect(),
    };
    let whole = || linears.iter().filter(|l| l.part.is_none());
    let mut keys = BTreeSet::new();
    match nodes {
        TargetModules::List(names) => {
            for name in names {
                let before = keys.len();
                keys.extend(whole().filter(|l| l.node_name == *name).map(Linear::key));
                if keys.len() == before && !whole().any(|l| l.node_name == *name) {
                    return Err(missing(linears, name));
                }
            }
        }
        TargetModules::Pattern(text) => {
            let regex: Regex = pattern("target_nodes", text)?;
            for linear in whole() {
                if is_match(&regex, &linear.node_name)? {
                    keys.insert(linear.key());
                }
            }
            if keys.is_empty() {
                return Err(missing(linears, text));
            }
        }
    }
    parts.extend(keys.into_iter().map(|key| escape(key).into_owned()));
    Ok(TargetModules::Pattern(parts.join("|")))
}

fn missing(linears: &[Linear], name: &str) -> Error {
    let nodes: Vec<&str> = linears.iter().filter(|l| l.part.is_none()).map(|l| l.node_name.as_str()).collect();
    Error::config(format!(
        "target_nodes: no node of a linear layer is called {name}.{} Nodes there are: {}",
        did_you_mean(name, nodes.iter().copied()),
        listed(&nodes, ", ")
    ))
}

#[cfg(test)]
mod tests {
    use super::super::tests::linears_in;
    use super::super::{Linear, select};
    use super::*;
    use crate::adapter::BoneConfig;

    fn chosen(linears: &[Linear], nodes: &str, targets: Option<&str>) -> Result<Vec<String>> {
        let targets = targets.map(TargetModules::parse);
        let target_modules = Some(with_nodes(linears, &TargetModules::parse(nodes), targets.as_ref())?);
        let selection = select(linears, &BoneConfig { target_modules, ..Default::default() })?;
        Ok(selection.chosen.iter().map(|i| linears[*i].key().to_string()).collect())
    }

    #[test]
    fn nodes_are_named_in_full_or_by_a_regex() {
        let linears = linears_in("models/llama.dyn18.ort_ext.onnx");
        assert_eq!(
            chosen(&linears, "node_linear_3,node_linear_14", None).unwrap(),
            ["node_linear_3", "node_linear_14"]
        );
        assert_eq!(chosen(&linears, "node_linear_1[0-4]?", None).unwrap().len(), 6);
        let text = chosen(&linears, "node_liner_3", None).unwrap_err().to_string();
        assert!(
            text.contains("no node of a linear layer is called node_liner_3. Did you mean node_linear_3,"),
            "{text}"
        );
        assert!(chosen(&linears, "linear_.*", None).unwrap_err().to_string().contains("Nodes there are: node_linear"));
        assert!(chosen(&linears, "node_linear_3", Some("all-linear")).is_err());
    }

    #[test]
    fn a_node_stands_for_its_module_and_adds_to_the_targets() {
        let linears = linears_in("models/bert.ts17.onnx");
        let node = "/bert/pooler/dense/Gemm";
        assert_eq!(chosen(&linears, node, None).unwrap(), ["bert.pooler.dense"]);
        assert_eq!(chosen(&linears, node, Some("query,value")).unwrap().len(), 5);
        assert_eq!(chosen(&linears, node, Some(".*query")).unwrap().len(), 3);
        // Every call of one module goes along.
        let linears = linears_in("models/seqnest.ts17.onnx");
        assert_eq!(chosen(&linears, "/lin_1/MatMul_1", None).unwrap(), ["lin", "lin"]);
    }
}
