//! An additive adapter as LoRA: `W' = W + B·A`, for the many programs that know LoRA and not Bone.
//!
//! Bone and MiSS mini are LoRA exactly: with A a fixed matrix of ones and zeros that sums the shards of the input, and
//! B the block's transpose. BAT is not, so its change of the weight is cut to the rank that is asked for.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use faer::Mat;
use ndarray::{Array2, ArrayView2};

use super::card::{self, Card};
use super::directory::write_tensors;
use super::{config_json, keys};
use crate::adapter::{BoneConfig, Dims, tile};
use crate::onnx::Tensor;
use crate::{Error, Result};

/// The two matrices of one layer; the layer's weight grows by `b·a`, with no other factor (`lora_alpha` is the rank).
#[derive(Debug, Clone, PartialEq)]
pub struct LoraPair {
    /// `[rank, in]`
    pub a: Array2<f32>,
    /// `[out, rank]`
    pub b: Array2<f32>,
}

/// The LoRA of rank r that equals the block D `[r, out]` of an additive variant bit for bit: each element of `b·a` is
/// one element of D.
pub fn exact(dims: &Dims, block: ArrayView2<f32>) -> LoraPair {
    LoraPair { a: tile::selection(dims.inputs, dims.r).reversed_axes(), b: block.t().to_owned() }
}

/// The LoRA of this rank that is nearest to `delta` `[out, in]`, by its singular values, of which each matrix takes
/// the square roots; and the relative error that is left, `‖delta − b·a‖ / ‖delta‖` in the Frobenius norm. A rank
/// beyond the matrix's own is filled up with zeros.
///
/// # Errors
/// A rank of 0; values that are not finite.
pub fn truncated(delta: ArrayView2<f32>, rank: usize) -> Result<(LoraPair, f64)> {
    if rank == 0 {
        return Err(Error::config("the rank of a LoRA should be a positive integer value but the value passed is 0"));
    }
    if delta.iter().any(|v| !v.is_finite()) {
        return Err(Error::model("the change of the weight has values that are not finite, so no LoRA is near it"));
    }
    let (outputs, inputs) = delta.dim();
    let matrix = Mat::from_fn(outputs, inputs, |o, i| f64::from(delta[[o, i]]));
    let svd = matrix
        .thin_svd()
        .map_err(|_| Error::model("the singular values of the weight's change could not be computed"))?;
    let (u, s, v) = (svd.U(), svd.S().column_vector(), svd.V());
    let kept = rank.min(outputs).min(inputs);
    let half = |vectors: faer::MatRef<f64>, at: usize, j: usize| {
        if j < kept { (vectors[(at, j)] * s[j].sqrt()) as f32 } else { 0.0 }
    };
    let a = Array2::from_shape_fn((rank, inputs), |(j, i)| half(v, i, j));
    let b = Array2::from_shape_fn((outputs, rank), |(o, j)| half(u, o, j));
    // Of the float32 matrices as they are, not of the singular values left out.
    let wide = |m: &Array2<f32>| Mat::from_fn(m.nrows(), m.ncols(), |i, j| f64::from(m[[i, j]]));
    let (left, whole) = ((&matrix - wide(&b) * wide(&a)).norm_l2(), matrix.norm_l2());
    Ok((LoraPair { a, b }, if whole > 0.0 { left / whole } else { left }))
}

/// Writes the adapter `name` into `dir` as PEFT's LoRA: `pairs` by module path, and the parameters trained in full as
/// [`super::write`] has them. `config` is that of the adapter it was made from, of which the task type and the layers
/// saved in full go on.
///
/// # Errors
/// No pair; pairs of different ranks; anything the file system refuses.
pub fn write_lora(
    dir: &Path,
    name: &str,
    pairs: &BTreeMap<String, LoraPair>,
    saved: &BTreeMap<String, Tensor>,
    config: &BoneConfig,
    base_model: Option<&str>,
) -> Result<()> {
    let Some(rank) = pairs.values().next().map(|pair| pair.a.nrows()) else {
        return Err(Error::model(format!("adapter {name} has no layer, so there is nothing to write")));
    };
    if let Some((module, pair)) = pairs.iter().find(|(_, pair)| [pair.a.nrows(), pair.b.ncols()] != [rank; 2]) {
        return Err(Error::model(format!(
            "adapter {name}: layer {module} has a LoRA of {:?} and {:?}, but the adapter's rank is {rank}",
            pair.b.dim(),
            pair.a.dim()
        )));
    }
    let matrices = pairs.iter().flat_map(|(module, pair)| {
        [('A', &pair.a), ('B', &pair.b)]
            .map(|(which, matrix)| (keys::lora(module, which), Cow::Owned(Tensor::F32(matrix.clone().into_dyn()))))
    });
    let saved_tensors = saved.iter().map(|(path, value)| (keys::saved(path, pairs), Cow::Borrowed(value)));
    write_tensors(dir, matrices.chain(saved_tensors))?;
    let count = pairs.values().map(|p| p.a.len() + p.b.len()).chain(saved.values().map(Tensor::len)).sum();
    card::write(dir, &Card::of_lora(config, rank, count, pairs.keys(), saved.keys(), base_model))?;
    config_json::write(dir, &config_json::lora(config, rank, pairs.keys(), base_model))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use ndarray::{Array2, arr2};
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;
    use safetensors::SafeTensors;
    use serde_json::Value;

    use super::*;
    use crate::adapter::{BoneConfig, TaskType};

    fn random(shape: (usize, usize), seed: u64) -> Array2<f32> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        Array2::from_shape_simple_fn(shape, || rng.random_range(-1.0..1.0))
    }

    #[test]
    fn the_exact_pair_is_the_tiled_block() {
        // A remainder, none, and a block taller than the layer.
        for (inputs, outputs, r) in [(7, 3, 3), (8, 5, 4), (3, 4, 5)] {
            let block = random((r, outputs), 1);
            let pair = exact(&Dims { inputs, outputs, r, mini_r: 1 }, block.view());
            assert_eq!((pair.a.dim(), pair.b.dim()), ((r, inputs), (outputs, r)));
            let tiled = Array2::from_shape_fn((outputs, inputs), |(o, i)| block[[i % r, o]]);
            assert_eq!(pair.b.dot(&pair.a), tiled);
        }
    }

    fn relative_error(delta: &Array2<f32>, pair: &LoraPair) -> f64 {
        let [d, a, b] = [delta, &pair.a, &pair.b].map(|m| m.mapv(f64::from));
        let norm = |m: Array2<f64>| m.iter().map(|v| v * v).sum::<f64>().sqrt();
        norm(&d - &b.dot(&a)) / norm(d)
    }

    #[test]
    fn truncation_is_the_nearest_and_tells_how_near() {
        let low = random((9, 3), 2).dot(&random((3, 14), 3));
        let (pair, error) = truncated(low.view(), 3).unwrap();
        assert!(error < 1e-6 && relative_error(&low, &pair) < 1e-6, "{error:e}");

        let full = random((12, 8), 4);
        let (pair, error) = truncated(full.view(), 5).unwrap();
        assert!((error - relative_error(&full, &pair)).abs() < 1e-12 && error > 0.1, "{error}");

        // Singular values 4, 3, 2, 1, of which two are left out, and both matrices get the roots of the others.
        let mut diagonal = Array2::zeros((4, 6));
        diagonal.diag_mut().assign(&ndarray::arr1(&[4.0, 3.0, 2.0, 1.0]));
        let (pair, error) = truncated(diagonal.view(), 2).unwrap();
        assert!((error - (5.0f64 / 30.0).sqrt()).abs() < 1e-6, "{error}");
        for norm in [pair.a.row(0).dot(&pair.a.row(0)), pair.b.column(0).dot(&pair.b.column(0))] {
            assert!((norm - 4.0).abs() < 1e-5, "{norm}");
        }
    }

    #[test]
    fn a_rank_beyond_the_matrix_and_no_change_at_all_are_met() {
        let delta = random((2, 3), 5);
        let (pair, error) = truncated(delta.view(), 4).unwrap();
        assert_eq!((pair.a.dim(), pair.b.dim()), ((4, 3), (2, 4)));
        assert!(error < 1e-6, "{error:e}");
        let (pair, error) = truncated(Array2::zeros((2, 3)).view(), 1).unwrap();
        assert_eq!((pair.a, error), (Array2::zeros((1, 3)), 0.0));
        let broken = arr2(&[[1.0, f32::NAN]]);
        assert!(truncated(broken.view(), 1).unwrap_err().to_string().contains("not finite"));
        assert!(truncated(delta.view(), 0).unwrap_err().to_string().contains("positive"));
    }

    fn written(pairs: &BTreeMap<String, LoraPair>) -> Result<tempfile::TempDir> {
        let dir = tempfile::tempdir().unwrap();
        let saved = ["a.query.bias", "classifier.weight"].map(|p| (p.to_string(), Tensor::new(&[1], vec![0.5f32])));
        let config = BoneConfig { task_type: Some(TaskType::SeqCls), ..Default::default() };
        write_lora(dir.path(), "default", pairs, &saved.into(), &config, Some("some/base")).map(|()| dir)
    }

    #[test]
    fn the_directory_is_a_lora_of_pefts() {
        let pair = exact(&Dims { inputs: 5, outputs: 3, r: 2, mini_r: 1 }, random((2, 3), 6).view());
        let pairs = BTreeMap::from([("a.query".to_string(), pair.clone())]);
        let dir = written(&pairs).unwrap();
        let bytes = fs::read(dir.path().join("adapter_model.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let mut names = file.names();
        names.sort();
        let wanted = ["a.query.base_layer.bias", "a.query.lora_A.weight", "a.query.lora_B.weight", "classifier.weight"];
        assert_eq!(names, wanted.map(|n| format!("base_model.model.{n}")));
        // Both are transposed views, and the file is row-major.
        for (name, matrix) in [("A", &pair.a), ("B", &pair.b)] {
            let tensor = file.tensor(&format!("base_model.model.a.query.lora_{name}.weight")).unwrap();
            let values: Vec<u8> = matrix.iter().flat_map(|v| v.to_le_bytes()).collect();
            assert_eq!((tensor.shape(), tensor.data()), (matrix.shape(), values.as_slice()));
        }
        let json: Value = serde_json::from_slice(&fs::read(dir.path().join("adapter_config.json")).unwrap()).unwrap();
        for (key, value) in [
            ("peft_type", serde_json::json!("LORA")),
            ("r", 2.into()),
            ("lora_alpha", 2.into()),
            ("target_modules", serde_json::json!(["a.query"])),
            ("modules_to_save", serde_json::json!(["classifier", "score"])),
            ("task_type", "SEQ_CLS".into()),
        ] {
            assert_eq!(json[key], value, "{key}");
        }
        assert!(fs::read_to_string(dir.path().join("README.md")).unwrap().contains("base_model: \"some/base\""));
    }

    #[test]
    fn ranks_that_differ_are_refused() {
        let pair = |rank| LoraPair { a: Array2::zeros((rank, 4)), b: Array2::zeros((3, rank)) };
        let pairs = BTreeMap::from([("p".to_string(), pair(2)), ("q".to_string(), pair(3))]);
        assert!(written(&pairs).unwrap_err().to_string().contains("layer q"));
        assert!(written(&BTreeMap::new()).unwrap_err().to_string().contains("no layer"));
    }
}
