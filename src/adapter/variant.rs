//! What a variant of Bone is: the shape and start of its parameter, and what the parameter does to a layer, as ONNX
//! nodes and as numbers. A new variant is one file that implements [`Variant`].

use ndarray::{Array2, ArrayD, ArrayViewD};
use rand_chacha::ChaCha8Rng;

use super::bat::Bat;
use super::bone::Bone;
use super::mini::Mini;
use super::tile;
use super::writer::Writer;
use super::{BoneConfig, InitWeights, MAX_SIZE};

/// Sizes of one adapted layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dims {
    pub inputs: usize,
    pub outputs: usize,
    pub r: usize,
    pub mini_r: usize,
}

/// A weight matrix in a model: how it lies there, and the factor its node puts on the product (Gemm's alpha), which
/// the adapter stands outside of.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Layout {
    /// `[out, in]` as torch has it; false: `[in, out]`.
    pub out_in: bool,
    pub alpha: f32,
}

/// A parameter made ready to change a stored weight, some rows at a time.
pub trait Merge: Send {
    /// Rows that have to be at hand together: chunks start at multiples of this, and hold whole ones.
    fn rows_together(&self) -> usize {
        1
    }

    /// Changes whole rows of the stored weight, the first of which is row `first`.
    fn apply(&self, rows: &mut [f32], row_len: usize, first: usize);
}

/// One kind of adapter. Weights and deltas are those of torch's Linear, `[out, in]`, where nothing else is said.
pub trait Variant: Sync {
    /// As messages call it.
    fn name(&self) -> &'static str;

    /// Why a layer of these sizes takes no adapter of this kind, if so.
    fn check(&self, _dims: &Dims) -> Result<(), String> {
        Ok(())
    }

    /// Shape of the parameter.
    fn shape(&self, dims: &Dims) -> Vec<usize>;

    /// A new parameter; zeros wherever nothing else is known of the variant.
    fn init(&self, dims: &Dims, _rng: &mut ChaCha8Rng) -> ArrayD<f32> {
        ArrayD::zeros(self.shape(dims))
    }

    /// The block D `[r, out]` of `y = base(x) + S(x)·D`, from the parameter; `None` for a variant that is not of that
    /// form (its effect on a layer depends on the layer's weight).
    fn block(&self, dims: &Dims, parameter: ArrayViewD<f32>) -> Option<Array2<f32>>;

    /// The nodes of [`Variant::block`]; returns the name of D.
    fn write_block(&self, _dims: &Dims, parameter: &str, _writer: &mut Writer) -> String {
        parameter.into()
    }

    /// True for `y = base(x) + S(x)·D`: adapters of this kind add up, in any order.
    fn is_additive(&self) -> bool {
        true
    }

    /// The nodes of the adapted weight W' from `weight`, a float32 value that lies as `layout` says; returns its name.
    fn write_weight(&self, dims: &Dims, layout: Layout, weight: &str, parameter: &str, writer: &mut Writer) -> String {
        let block = self.write_block(dims, parameter, writer);
        tile::write_weight(dims, layout, weight, &block, writer)
    }

    /// What turns a stored weight into the adapted one, or (`undo`) the adapted one back.
    ///
    /// # Errors
    /// Where there is no way back.
    fn merger(
        &self,
        dims: &Dims,
        layout: Layout,
        parameter: ArrayViewD<f32>,
        undo: bool,
    ) -> Result<Box<dyn Merge>, String> {
        match self.block(dims, parameter) {
            Some(block) => Ok(Box::new(tile::Tiled::new(block.view(), layout, undo))),
            None => Err(format!("{} has no block to tile", self.name())),
        }
    }
}

impl InitWeights {
    /// The variant that this initialisation names.
    pub fn variant(self) -> &'static dyn Variant {
        match self {
            Self::Zeros => &Bone { random: false },
            Self::Random => &Bone { random: true },
            Self::Bat => &Bat,
            Self::Mini => &Mini,
        }
    }
}

impl BoneConfig {
    /// Sizes of a layer under this config.
    ///
    /// # Errors
    /// Why a layer of `inputs` → `outputs` takes no such adapter.
    pub fn dims(&self, inputs: usize, outputs: usize) -> Result<Dims, String> {
        let dims = Dims { inputs, outputs, r: self.r, mini_r: self.mini_r };
        if self.r == 0 || self.r.saturating_mul(inputs.max(outputs)) > MAX_SIZE {
            return Err(format!("r = {} is too large for {inputs} → {outputs}", self.r));
        }
        self.init_weights.variant().check(&dims)?;
        Ok(dims)
    }
}
