//! The flags that say what data is read, and how.

use std::path::PathBuf;
use std::str::FromStr;

use crate::train::TrainOptions;
use crate::train::data::{ImageOptions, TextOptions};

#[derive(clap::Args)]
pub struct DataArgs {
    /// Training data (comma-separated, or the flag again): files, patterns as 'shards/*.parquet', a folder that
    /// `datasets` saved, or a folder of images with a folder per class. Arrays per input and labels: .safetensors, .npz;
    /// rows: .jsonl, .csv, .tsv, .parquet, .arrow
    #[arg(long, value_name = "FILES", required = true, value_delimiter = ',')]
    pub data: Vec<PathBuf>,

    /// Data to evaluate on
    #[arg(long, value_name = "FILES", value_delimiter = ',')]
    pub eval_data: Vec<PathBuf>,

    /// Name of the array with the labels
    #[arg(long, value_name = "NAME", default_value = "labels")]
    pub labels: String,

    /// What an input (or the labels) is made of in files of rows: a column, or several to be joined, as in
    /// x=width,height or x=pixel* [default: the column of its name, or those numbered x_0, x_1, …]
    #[arg(long, value_name = "INPUT=COLUMN")]
    map: Vec<Mapping>,

    /// Tokenizer of texts (tokenizer.json)
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,

    /// Column that holds the text
    #[arg(long, value_name = "COLUMN", default_value = "text")]
    text_field: String,

    /// Column that holds the second text of a pair
    #[arg(long, value_name = "COLUMN")]
    text_pair_field: Option<String>,

    /// Column that holds the label
    #[arg(long, value_name = "COLUMN", default_value = "label")]
    label_field: String,

    /// Column that holds the anchor of a pair (in files of arrays: anchor.INPUT for each input)
    #[arg(long, value_name = "COLUMN", default_value = "anchor")]
    anchor_field: String,

    /// Column that holds what belongs to the anchor (arrays: positive.INPUT)
    #[arg(long, value_name = "COLUMN", default_value = "positive")]
    positive_field: String,

    /// Column that holds what does not (arrays: negative.INPUT) [default: negative, where it is there]
    #[arg(long, value_name = "COLUMN")]
    negative_field: Option<String>,

    /// Tokens of a text that are read [default: as the tokenizer says, or 512]
    #[arg(long)]
    max_length: Option<usize>,

    /// For causal-lm: join the texts, an end-of-text token between them, and cut them into rows of exactly --max-length
    /// tokens, which are their own labels; the last row is left out unless it is full
    #[arg(long)]
    packing: bool,

    /// The token that --packing puts between texts [default: the tokenizer's <|endoftext|>, </s> and the like]
    #[arg(long, value_name = "TOKEN")]
    eos_token: Option<String>,

    /// Column that holds images, or paths of images [default: the only one with images, or image]
    #[arg(long, value_name = "COLUMN")]
    image_field: Option<String>,

    /// What images are resized to [default: as the model's input is fixed]
    #[arg(long, value_name = "N|WIDTHxHEIGHT")]
    image_size: Option<Size>,

    /// Taken off each channel of pixels from 0 to 1 [default: 0.485,0.456,0.406 (ImageNet's); 0 for grey]
    #[arg(long, value_delimiter = ',', allow_negative_numbers = true)]
    image_mean: Option<Vec<f32>>,

    /// What each channel is divided by after that [default: 0.229,0.224,0.225 (ImageNet's); 1 for grey]
    #[arg(long, value_delimiter = ',')]
    image_std: Option<Vec<f32>>,

    /// MiB of memory that rows may take once they are read. Where they are more, all of them go to files without a name on
    /// the disk of the output directory, and each batch is read from there: the run's bits are the same
    #[arg(long, value_name = "MIB", default_value_t = TrainOptions::DATA_MEMORY >> 20)]
    data_memory: u64,
}

/// `input=column`, `input=a,b,c`, and several of these with commas between.
#[derive(Debug, Clone, PartialEq)]
struct Mapping(Vec<(String, Vec<String>)>);

impl FromStr for Mapping {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut all: Vec<(String, Vec<String>)> = Vec::new();
        for part in text.split(',') {
            match (part.split_once('='), all.last_mut()) {
                (Some((input, column)), _) if !input.is_empty() && !column.is_empty() => {
                    all.push((input.into(), vec![column.into()]));
                }
                (None, Some((_, columns))) if !part.is_empty() => columns.push(part.into()),
                _ => return Err(format!("{part:?} is no INPUT=COLUMN")),
            }
        }
        Ok(Self(all))
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct Size(usize, usize);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (width, height) = text.split_once('x').unwrap_or((text, text));
        match (width.parse(), height.parse()) {
            (Ok(width @ 1..=65536), Ok(height @ 1..=65536)) => Ok(Self(width, height)),
            _ => Err("a size is a number of pixels, or WIDTHxHEIGHT".into()),
        }
    }
}

impl DataArgs {
    /// Puts what was given into `options`.
    pub fn fill(&self, options: &mut TrainOptions) {
        options.data = self.data.clone();
        options.eval_data = self.eval_data.clone();
        options.labels = self.labels.clone();
        options.map = self.map.iter().flat_map(|m| m.0.clone()).collect();
        options.text = TextOptions {
            tokenizer: self.tokenizer.clone(),
            text_field: self.text_field.clone(),
            text_pair_field: self.text_pair_field.clone(),
            label_field: self.label_field.clone(),
            anchor_field: self.anchor_field.clone(),
            positive_field: self.positive_field.clone(),
            negative_field: self.negative_field.clone(),
            max_length: self.max_length,
            packing: self.packing,
            eos_token: self.eos_token.clone(),
        };
        options.image = ImageOptions {
            field: self.image_field.clone(),
            size: self.image_size.map(|Size(width, height)| (width, height)),
            mean: self.image_mean.clone(),
            std: self.image_std.clone(),
        };
        options.data_memory = self.data_memory.saturating_mul(1 << 20);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_and_sizes_are_read() {
        let mapping = |text: &str| text.parse::<Mapping>().map(|m| m.0);
        let of = |name: &str, columns: &[&str]| (name.to_string(), columns.iter().map(|c| c.to_string()).collect());
        assert_eq!(mapping("x=a,b,y=c").unwrap(), [of("x", &["a", "b"]), of("y", &["c"])]);
        for bad in ["", "a", "=a", "x=", "x=a,,b"] {
            assert!(mapping(bad).is_err(), "{bad:?}");
        }
        assert_eq!("32".parse(), Ok(Size(32, 32)));
        assert_eq!("32x16".parse(), Ok(Size(32, 16)));
        for bad in ["", "0", "x", "32x", "-1", "70000"] {
            assert!(bad.parse::<Size>().is_err(), "{bad:?}");
        }
    }
}
