//! Texts joined and cut into rows of one length, so that no place in a batch is padding: transformers' `group_texts`
//! (`run_clm.py`), which TRL calls packing of the kind "wrapped". A row may hold the end of one text and the beginning of
//! the next; an end-of-text token stands between them.

use super::TextOptions;
use super::text::Texts;
use crate::{Error, Result};

/// What models whose tokenizers have them end a text with.
const ENDS: [&str; 5] = ["<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|end▁of▁sentence|>"];

/// How texts are packed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Packing {
    /// Tokens of a row.
    length: usize,
    /// The token between two texts.
    end: u32,
}

/// What packing made of a dataset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packed {
    pub texts: usize,
    pub rows: usize,
    /// Tokens of each row.
    pub length: usize,
    /// Tokens at the end that fill no row.
    pub left_out: usize,
}

impl Packing {
    /// # Errors
    /// A tokenizer without an end-of-text token, or with several that could be it; rows of no other length than the model
    /// takes.
    pub fn new(texts: &Texts, options: &TextOptions) -> Result<Self> {
        let length = texts.max_length;
        if let Some(wanted) = options.max_length.filter(|wanted| *wanted != length) {
            return Err(Error::config(format!(
                "max-length is {wanted}, but the model takes rows of {length} tokens only; leave it out with packing"
            )));
        }
        if length < 2 {
            return Err(Error::config("max-length has to be at least 2 with packing: a token and the one after it"));
        }
        let file = texts.file.display();
        let end = match &options.eos_token {
            Some(token) => texts
                .id(token)
                .ok_or_else(|| Error::config(format!("eos-token is {token:?}, which is no token of {file}")))?,
            None => {
                let found: Vec<(&str, u32)> = ENDS.iter().filter_map(|t| Some((*t, texts.id(t)?))).collect();
                match found.as_slice() {
                    [(_, id)] => *id,
                    [] => {
                        return Err(Error::config(format!(
                            "{file} has no end-of-text token to put between texts (none of {}); name one with --eos-token",
                            ENDS.join(", ")
                        )));
                    }
                    several => {
                        let names: Vec<&str> = several.iter().map(|(name, _)| *name).collect();
                        return Err(Error::config(format!(
                            "{file} has several end-of-text tokens: {}; choose one with --eos-token",
                            names.join(", ")
                        )));
                    }
                }
            }
        };
        Ok(Self { length, end })
    }
}

/// Texts that are being packed.
#[derive(Debug)]
pub(super) struct Packer {
    packing: Packing,
    /// Tokens that fill no row yet.
    rest: Vec<u32>,
    texts: usize,
    rows: usize,
    /// Whether the token between two texts is due before the next one.
    open: bool,
}

impl Packer {
    pub fn new(packing: Packing) -> Self {
        Self { packing, rest: Vec::new(), texts: 0, rows: 0, open: false }
    }

    /// Appends the tokens of a text; returns the rows that are whole now.
    pub fn push(&mut self, tokens: &[u32]) -> Vec<Vec<i64>> {
        let Packing { length, end } = self.packing;
        self.texts += 1;
        let (Some(first), Some(last)) = (tokens.first(), tokens.last()) else { return Vec::new() };
        // A tokenizer may put it there itself.
        if self.open && *first != end {
            self.rest.push(end);
        }
        self.open = *last != end;
        self.rest.extend(tokens);
        let rows = self.rest.chunks_exact(length);
        let left = rows.remainder().to_vec();
        let rows: Vec<Vec<i64>> = rows.map(|row| row.iter().copied().map(i64::from).collect()).collect();
        self.rest = left;
        self.rows += rows.len();
        rows
    }

    /// What has come of the texts so far.
    pub fn packed(&self) -> Packed {
        Packed { texts: self.texts, rows: self.rows, length: self.packing.length, left_out: self.rest.len() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::onnx::{DataType, Tensor, value_info};
    use crate::train::data::Field;
    use crate::train::data::tests::Case;

    /// A word-level tokenizer: </s> 0, [CLS] 1, a..e 2..6; every text begins with [CLS].
    fn tokenizer(end: &str) -> String {
        include_str!("../../../fixtures/data/tokenizer.json").replace("[PAD]", end)
    }

    fn case(dims: &[&str]) -> Case {
        let inputs = ["input_ids", "attention_mask", "token_type_ids", "position_ids"];
        let mut case = Case::new(&inputs.map(|name| (name, DataType::Int64, dims)));
        case.output = Field::of(&value_info("logits", DataType::Float, &["n", "t", "7"]));
        case.text.tokenizer = Some(case.write("tokenizer.json", tokenizer("</s>").as_bytes()));
        case.text.packing = true;
        case.text.max_length = Some(4);
        case
    }

    const TEXTS: &[u8] =
        b"{\"text\": \"a b\", \"label\": \"x\"}\n{\"text\": \"\"}\n{\"text\": \"c d e a\"}\n{\"text\": \"b\"}";

    #[test]
    fn texts_are_joined_by_the_end_of_text_and_cut_into_full_rows() {
        for (dims, length) in [(["n", "t"], Some(4)), (["n", "4"], None)] {
            let mut case = case(&dims);
            case.text.max_length = length;
            let dataset = case.open(&case.write("d.jsonl", TEXTS)).unwrap();
            assert_eq!(dataset.packed, Some(Packed { texts: 4, rows: 3, length: 4, left_out: 2 }));
            let feed = case.feed(&dataset).unwrap();
            assert_eq!(feed.rows(), 3);
            let batch = feed.batch(&[0, 1, 2]).unwrap();
            let rows = |values: [i64; 12]| Tensor::new(&[3, 4], values.to_vec());
            // [CLS] a b </s>, [CLS] </s> [CLS] c, d e a </s>; [CLS] b fill no row.
            let ids = rows([1, 2, 3, 0, 1, 0, 1, 4, 5, 6, 2, 0]);
            let expected = [
                ("input_ids", ids.clone()),
                ("attention_mask", rows([1; 12])),
                ("token_type_ids", rows([0; 12])),
                ("position_ids", rows([0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3])),
            ];
            assert_eq!(batch.inputs, expected.map(|(name, value)| (name.to_string(), value)));
            assert_eq!(batch.targets, [ids]);
            assert_eq!(batch.tokens, Some(12));
        }
    }

    #[test]
    fn an_end_of_text_that_the_tokenizer_puts_itself_is_enough() {
        let mut packer = Packer::new(Packing { length: 3, end: 9 });
        let texts: [&[u32]; 5] = [&[1, 9], &[2], &[9, 3], &[4, 5, 6, 7, 8], &[]];
        let rows: Vec<Vec<i64>> = texts.into_iter().flat_map(|text| packer.push(text)).collect();
        assert_eq!(rows, [[1, 9, 2], [9, 3, 9], [4, 5, 6]]);
        assert_eq!(packer.packed(), Packed { texts: 5, rows: 3, length: 3, left_out: 2 });
    }

    #[test]
    fn what_cannot_be_packed_is_refused() {
        type Change = fn(&mut Case);
        let cases: [(&[&str], Change, &str); 11] = [
            (&["n", "t"], |c| c.text.eos_token = Some("zz".into()), "eos-token is \"zz\", which is no token of"),
            (
                &["n", "t"],
                |c| drop(c.write("tokenizer.json", tokenizer("[PAD]").as_bytes())),
                "name one with --eos-token",
            ),
            (
                &["n", "t"],
                |c| drop(c.write("tokenizer.json", tokenizer("</s>").replace("[CLS]", "<eos>").as_bytes())),
                "several end-of-text tokens: </s>, <eos>",
            ),
            (&["n", "3"], |_| (), "rows of 3 tokens only"),
            (&["n", "t"], |c| c.text.max_length = Some(1), "max-length is 1"),
            (
                &["n", "t"],
                |c| c.text.max_length = Some(15),
                "its 4 texts have 14 tokens together, fewer than one row of 15",
            ),
            (&["n", "t"], |c| c.text.tokenizer = None, "--tokenizer"),
            (&["n", "t"], |c| c.text.text_pair_field = Some("text".into()), "leave out --text-pair-field"),
            (&["n", "t"], |c| c.text.text_field = "txt".into(), "Did you mean text?"),
            (&["n", "t"], |c| c.map = vec![("labels".into(), vec!["text".into()])], "leave out --map labels="),
            (
                &["n", "t"],
                |c| c.map = vec![("position_ids".into(), vec!["text".into()])],
                "input position_ids is not made",
            ),
        ];
        for (dims, change, word) in cases {
            let mut case = case(dims);
            change(&mut case);
            let complaint = case.open(&case.write("d.jsonl", TEXTS)).unwrap_err().to_string();
            assert!(complaint.contains(word), "{word:?} is missing in {complaint:?}");
        }
        let arrays = case(&["n", "t"]);
        let complaint = arrays.open(&arrays.write("d.npz", b"")).unwrap_err().to_string();
        assert!(complaint.contains("d.npz") && complaint.contains("leave out --packing"), "{complaint}");
    }
}
