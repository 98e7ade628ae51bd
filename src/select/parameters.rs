use super::{Linear, Source};
use crate::onnx::{DataType, GraphProto, Scope};
pub struct Use {
    pub scope: Scope,
    pub node: usize,
    pub input: usize,
}
pub struct Parameter {
    pub path: String,
    pub source: Source,
    pub stored: String,
    pub uses: Vec<Use>,
    pub dims: Vec<usize>,
    pub data_type: DataType,
    pub transposed: bool,
    pub stored_transposed: bool,
    pub exclusive: bool,
    pub is_bias: bool,
}
pub fn parameters(_: &GraphProto, _: &[Linear]) -> Vec<Parameter> {
    Vec::new()
}
pub fn saved(_: &[Parameter], _: &[String]) -> Vec<usize> {
    Vec::new()
}
pub struct Defaults {
    pub model_type: String,
    pub modules: Vec<String>,
    pub told_by: String,
}
pub fn default_targets(_: &crate::onnx::Model, _: &[Linear]) -> crate::Result<Defaults> {
    Err(crate::Error::model("x"))
}
impl std::str::FromStr for super::Version {
    type Err = String;
    fn from_str(_: &str) -> Result<Self, String> {
        Ok(Self::Peft021)
    }
}
