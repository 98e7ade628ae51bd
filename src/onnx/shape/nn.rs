//! Layers: normalization, convolution, pooling, recurrence, attention, losses, quantization.

use super::op::{Op, Rules, known};
use super::{DataType, Dim};

pub(super) const RULES: Rules = &[
    (&["LayerNormalization"], layer_normalization),
    (&["BatchNormalization"], batch_normalization),
    (&["Conv", "com.microsoft:FusedConv"], conv),
    (&["ConvInteger"], conv_integer),
    (&["QLinearConv"], qlinear_conv),
    (&["ConvTranspose"], conv_transpose),
    (&["MaxPool", "AveragePool", "LpPool"], pool),
    (&["GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"], global_pool),
    (&["Resize", "Upsample"], resize),
    (&["GridSample"], grid_sample),
    (&["RoiAlign"], roi_align),
    (&["LSTM", "GRU", "RNN"], recurrent),
    (&["Attention"], attention),
    (&["RotaryEmbedding"], rotary),
    (&["NegativeLogLikelihoodLoss", "SoftmaxCrossEntropyLoss"], loss),
    (&["QuantizeLinear", "com.microsoft:QuantizeLinear"], quantize),
    (&["DequantizeLinear", "com.microsoft:DequantizeLinear"], dequantize),
    (&["DynamicQuantizeLinear"], dynamic_quantize),
];

const ONE: Dim = Dim::Known(1);

fn layer_normalization(op: &mut Op) -> Option<()> {
    let dims = op.dims(0);
    op.out(dims.clone());
    let statistics = dims.and_then(|dims| {
        let axis = op.axis("axis", -1, dims.len())?;
        Some(dims.iter().enumerate().map(|(i, d)| if i < axis { *d } else { ONE }).collect::<Vec<_>>())
    });
    // `stash_type`: the type that the statistics are computed in, float32 by default.
    let stash = if op.node.attr("stash_type").is_some() { op.type_attr("stash_type") } else { Some(DataType::Float) };
    op.set(1, stash, statistics.clone());
    op.set(2, stash, statistics);
    Some(())
}

fn batch_normalization(op: &mut Op) -> Option<()> {
    let dims = op.dims(0);
    op.out(dims);
    for i in 1..op.node.output.len() {
        // Every further output is a statistic per channel.
        let (element, channels) = (op.element(3), op.dims(3));
        op.set(i, element, channels);
    }
    Some(())
}

/// A window that slides over the spatial dimensions, as convolutions and pools describe it.
struct Window {
    kernel: Vec<Dim>,
    strides: Vec<i64>,
    dilations: Vec<i64>,
    /// Before each dimension, then behind each.
    pads: Vec<i64>,
    auto_pad: AutoPad,
}

#[derive(PartialEq)]
enum AutoPad {
    NotSet,
    Same,
    Valid,
}

impl Window {
    fn of(op: &Op, kernel: Vec<Dim>) -> Option<Self> {
        let rank = kernel.len();
        let ints = |name: &str, length: usize, default: i64| match op.node.attr_ints(name) {
            Some(ints) if !ints.is_empty() => (ints.len() == length).then(|| ints.to_vec()),
            _ => Some(vec![default; length]),
        };
        let auto_pad = match op.node.attr_s("auto_pad").unwrap_or("NOTSET") {
            "NOTSET" | "" => AutoPad::NotSet,
            "SAME_UPPER" | "SAME_LOWER" => AutoPad::Same,
            "VALID" => AutoPad::Valid,
            _ => return None,
        };
        let strides = ints("strides", rank, 1)?;
        strides.iter().all(|s| *s > 0).then_some(())?;
        Some(Self {
            kernel,
            strides,
            dilations: ints("dilations", rank, 1)?,
            pads: if auto_pad == AutoPad::Valid { vec![0; 2 * rank] } else { ints("pads", 2 * rank, 0)? },
            auto_pad,
        })
    }

    /// Dilated extent of the kernel along dimension `i`.
    fn extent(&self, op: &mut Op, i: usize) -> Dim {
        let gaps = op.symbols().sub(self.kernel[i], ONE);
        let gaps = op.symbols().mul(gaps, Dim::Known(self.dilations[i]));
        op.symbols().add(gaps, ONE)
    }

    fn padding(&self, i: usize) -> Dim {
        Dim::Known(self.pads[i].saturating_add(self.pads[i + self.kernel.len()]))
    }

    /// Number of places of the window along dimension `i` of size `size`.
    fn places(&self, op: &mut Op, i: usize, size: Dim, ceil: bool) -> Dim {
        let stride = self.strides[i];
        if self.auto_pad == AutoPad::Same {
            return op.symbols().div_ceil(size, stride);
        }
        let extent = self.extent(op, i);
        let padded = op.symbols().add(size, self.padding(i));
        let free = op.symbols().sub(padded, extent);
        if !ceil || stride == 1 {
            let steps = op.symbols().div(free, Dim::Known(stride));
            return op.symbols().add(steps, ONE);
        }
        // Rounded up, but no window starts in the padding behind the data.
        match (known(free), known(size)) {
            (Some(free), Some(size)) if free >= 0 => {
                let steps = (free / stride) + i64::from(free % stride != 0);
                let behind = steps.saturating_mul(stride) >= size.saturating_add(self.pads[i]);
                Dim::Known(if behind { steps } else { steps.saturating_add(1) })
            }
            _ => op.fresh(),
        }
    }
}

/// Sets output 0 of a convolution whose weights are input `w`.
fn convolution(op: &mut Op, w: usize, element: Option<DataType>) -> Option<()> {
    op.set(0, element, None);
    let (x, weight) = (op.dims(0)?, op.dims(w)?);
    let ([batch, _, spatial @ ..], [channels, _, kernel @ ..]) = (x.as_slice(), weight.as_slice()) else { return None };
    if spatial.len() != kernel.len() {
        return None;
    }
    let window = Window::of(op, kernel.to_vec())?;
    let places: Vec<Dim> = spatial.iter().enumerate().map(|(i, size)| window.places(op, i, *size, false)).collect();
    op.set(0, element, Some([&[*batch, *channels][..], &places].concat()));
    Some(())
}

fn conv(op: &mut Op) -> Option<()> {
    let element = op.element(0);
    convolution(op, 1, element)
}

fn conv_integer(op: &mut Op) -> Option<()> {
    convolution(op, 1, Some(DataType::Int32))
}

fn qlinear_conv(op: &mut Op) -> Option<()> {
    let element = op.element(7);
    convolution(op, 3, element)
}

fn conv_transpose(op: &mut Op) -> Option<()> {
    op.out(None);
    let (x, weight) = (op.dims(0)?, op.dims(1)?);
    let ([batch, _, spatial @ ..], [_, channels, kernel @ ..]) = (x.as_slice(), weight.as_slice()) else { return None };
    if spatial.len() != kernel.len() {
        return None;
    }
    let group = Dim::Known(op.node.attr_i("group", 1));
    let channels = op.symbols().mul(*channels, group);
    let window = Window::of(op, kernel.to_vec())?;
    let mut dims = vec![*batch, channels];
    if let Some(sizes) = op.node.attr_ints("output_shape").filter(|sizes| !sizes.is_empty()) {
        let sizes = sizes.get(sizes.len().checked_sub(spatial.len())?..)?;
        dims.extend(sizes.iter().map(|n| Dim::Known(*n)));
    } else {
        let extra = op.node.attr_ints("output_padding").unwrap_or_default().to_vec();
        for (i, size) in spatial.iter().enumerate() {
            let stride = Dim::Known(window.strides[i]);
            dims.push(if window.auto_pad == AutoPad::Same {
                op.symbols().mul(*size, stride)
            } else {
                let extent = window.extent(op, i);
                let s = op.symbols();
                let steps = s.sub(*size, ONE);
                let steps = s.mul(steps, stride);
                let full = s.add(steps, extent);
                let full = s.add(full, Dim::Known(extra.get(i).copied().unwrap_or(0)));
                s.sub(full, window.padding(i))
            });
        }
    }
    op.out(Some(dims));
    Some(())
}

fn pool(op: &mut Op) -> Option<()> {
    let x = op.dims(0)?;
    let [batch, channels, spatial @ ..] = x.as_slice() else { return None };
    let kernel: Vec<Dim> = op.node.attr_ints("kernel_shape")?.iter().map(|n| Dim::Known(*n)).collect();
    if spatial.len() != kernel.len() {
        return None;
    }
    let window = Window::of(op, kernel)?;
    let ceil = op.node.attr_i("ceil_mode", 0) != 0;
    let places: Vec<Dim> = spatial.iter().enumerate().map(|(i, size)| window.places(op, i, *size, ceil)).collect();
    let dims = [&[*batch, *channels][..], &places].concat();
    op.out(Some(dims.clone()));
    op.set(1, Some(DataType::Int64), Some(dims));
    Some(())
}

fn global_pool(op: &mut Op) -> Option<()> {
    let dims = op.dims(0).map(|dims| dims.iter().enumerate().map(|(i, d)| if i < 2 { *d } else { ONE }).collect());
    op.out(dims);
    Some(())
}

fn resize(op: &mut Op) -> Option<()> {
    op.out(None);
    let mut dims = op.dims(0)?;
    let rank = dims.len();
    let axes: Vec<usize> = match op.node.attr_ints("axes") {
        Some(axes) => axes.iter().map(|a| super::op::axis(*a, rank)).collect::<Option<_>>()?,
        None => (0..rank).collect(),
    };
    let stretch = op.node.attr_s("keep_aspect_ratio_policy").unwrap_or("stretch") == "stretch";
    // Opset 7: attribute; 9 and 10: input 1; since 11: input 2, or sizes as input 3.
    let scales = match op.node.attr("scales") {
        Some(scales) => Some(scales.floats.iter().map(|f| f64::from(*f)).collect()),
        None => op.floats(if op.node.is("Upsample") || op.opset < 11 { 1 } else { 2 }).map(<[f64]>::to_vec),
    };
    match (op.elements(3), scales) {
        (Some(sizes), _) if sizes.len() == axes.len() && stretch => {
            axes.into_iter().zip(sizes).for_each(|(axis, size)| dims[axis] = size);
        }
        (None, Some(scales)) if scales.len() == axes.len() && !op.has(3) => {
            for (axis, scale) in axes.into_iter().zip(scales) {
                dims[axis] = match dims[axis] {
                    dim if scale == 1.0 => dim,
                    // In f32, as the specification's reference and the engines compute it.
                    Dim::Known(n) => Dim::Known((n as f32 * scale as f32).floor() as i64),
                    dim if scale.fract() == 0.0 && (1.0..1e9).contains(&scale) => {
                        op.symbols().mul(dim, Dim::Known(scale as i64))
                    }
                    _ => op.fresh(),
                };
            }
        }
        _ => axes.into_iter().for_each(|axis| dims[axis] = op.fresh()),
    }
    op.out(Some(dims));
    Some(())
}

fn grid_sample(op: &mut Op) -> Option<()> {
    op.out(None);
    let (x, grid) = (op.dims(0)?, op.dims(1)?);
    let ([batch, channels, ..], [_, places @ .., _]) = (x.as_slice(), grid.as_slice()) else { return None };
    op.out(Some([&[*batch, *channels][..], places].concat()));
    Some(())
}

fn roi_align(op: &mut Op) -> Option<()> {
    op.out(None);
    let (channels, count) = (*op.dims(0)?.get(1)?, *op.dims(1)?.first()?);
    let [height, width] = ["output_height", "output_width"].map(|name| Dim::Known(op.node.attr_i(name, 1)));
    op.out(Some(vec![count, channels, height, width]));
    Some(())
}

fn recurrent(op: &mut Op) -> Option<()> {
    let element = op.element(0);
    let &[first, second, _] = op.dims(0)?.as_slice() else { return None };
    let directions = Dim::Known(if op.node.attr_s("direction") == Some("bidirectional") { 2 } else { 1 });
    let hidden = match op.node.attr("hidden_size") {
        Some(size) => Dim::Known(size.i()),
        None => *op.dims(2)?.get(2)?,
    };
    // `layout` 1 (since opset 14) puts the batch first.
    let (all, last) = if op.node.attr_i("layout", 0) == 0 {
        ([first, directions, second, hidden], [directions, second, hidden])
    } else {
        ([first, second, directions, hidden], [first, directions, hidden])
    };
    op.set(0, element, Some(all.to_vec()));
    op.set(1, element, Some(last.to_vec()));
    op.set(2, element, Some(last.to_vec()));
    Some(())
}

/// Attention of opset 23: inputs of rank 4 `[batch, heads, length, size]` or 3 `[batch, length, heads * size]`.
/// Outputs: the result, keys and values with the past ones before them, the scores.
fn attention(op: &mut Op) -> Option<()> {
    let element = op.element(0);
    (0..4).for_each(|i| op.set(i, element, None));
    // As rank 4, whichever it is.
    let mut split = |i: usize, heads: &str| {
        Some(match *op.dims(i)?.as_slice() {
            [batch, heads, length, size] => [batch, heads, length, size],
            [batch, length, width] => {
                let heads = Dim::Known(op.node.attr(heads)?.i());
                [batch, heads, length, op.symbols().div(width, heads)]
            }
            _ => return None,
        })
    };
    let (q, k, v) = (split(0, "q_num_heads")?, split(1, "kv_num_heads")?, split(2, "kv_num_heads")?);
    let [batch, heads, length, _] = q;
    let result = match op.rank(0) {
        Some(3) => vec![batch, length, op.symbols().mul(heads, v[3])],
        _ => vec![batch, heads, length, v[3]],
    };
    op.set(0, element, Some(result));
    let past = if op.has(4) { *op.dims(4)?.get(2)? } else { Dim::Known(0) };
    let total = op.symbols().add(past, k[2]);
    op.set(1, element, Some(vec![batch, k[1], total, k[3]]));
    op.set(2, element, Some(vec![batch, v[1], total, v[3]]));
    op.set(3, element, Some(vec![batch, heads, length, total]));
    Some(())
}

fn rotary(op: &mut Op) -> Option<()> {
    let dims = op.dims(0);
    op.out(dims);
    Some(())
}

fn loss(op: &mut Op) -> Option<()> {
    let element = op.element(0);
    let dims = if op.node.attr_s("reduction") == Some("none") { op.dims(1) } else { Some(vec![]) };
    op.set(0, element, dims);
    let scores = op.dims(0);
    op.set(1, element, scores);
    Some(())
}

fn quantize(op: &mut Op) -> Option<()> {
    let element = match op.node.attr("output_dtype") {
        Some(_) if op.node.attr_i("output_dtype", 0) != 0 => op.type_attr("output_dtype"),
        _ if op.has(2) => op.element(2),
        _ => Some(DataType::Uint8),
    };
    let dims = op.dims(0);
    op.set(0, element, dims);
    Some(())
}

fn dequantize(op: &mut Op) -> Option<()> {
    let element = op.type_attr("output_dtype").or(op.element(1));
    let dims = op.dims(0);
    op.set(0, element, dims);
    Some(())
}

fn dynamic_quantize(op: &mut Op) -> Option<()> {
    let dims = op.dims(0);
    op.set(0, Some(DataType::Uint8), dims);
    op.set(1, Some(DataType::Float), Some(vec![]));
    op.set(2, Some(DataType::Uint8), Some(vec![]));
    Some(())
}
