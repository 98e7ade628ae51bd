//! The adapter's branch and its weight where a layer is no plain product of rows: a convolution, an Einsum, or a part of
//! a packed layer.

use std::ops::Range;

use crate::adapter::{Dims, Layout, Variant, Writer, tile};
use crate::onnx::{AttributeProto, DataType};
use crate::select::{Form, Sum};

/// The nodes of `S(x)·D`, multiplied as the layer multiplies, x and D being of type `element`, float64, or float32;
/// returns its name.
pub(super) fn write_branch(
    form: &Form,
    dims: &Dims,
    (x, block): (&str, &str),
    element: DataType,
    w: &mut Writer,
) -> String {
    let select = |w: &mut Writer| match (w.selection(dims.inputs, dims.r), element) {
        (selection, DataType::Double) => w.cast(&selection, "select", DataType::Double),
        (selection, _) => selection,
    };
    match form {
        Form::Rows | Form::Within => tile::write_branch(dims, x, block, element, w),
        Form::Channels(spatial) => channels(*spatial, dims, x, &select(w), block, w),
        Form::Sum(sum) => by_sum(sum, dims, x, select(w), block, w),
    }
}

/// Two convolutions: to the sums of the channels, and from them to the outputs.
fn channels(spatial: usize, dims: &Dims, x: &str, selection: &str, block: &str, w: &mut Writer) -> String {
    let mut kernel = |matrix: &str, what: &str, rows: usize, columns: usize| {
        let turned = w.transposed(matrix);
        w.reshaped(&turned, what, &[vec![columns, rows], vec![1; spatial]].concat())
    };
    let select = kernel(selection, "select", dims.inputs, dims.r);
    let block = kernel(block, "block", dims.r, dims.outputs);
    let shards = w.op("Conv", "shards", &[x, &select], Vec::new());
    w.op("Conv", "delta", &[&shards, &block], Vec::new())
}

/// Two Einsums, over a label of their own between them.
fn by_sum(sum: &Sum, dims: &Dims, x: &str, selection: String, block: &str, w: &mut Writer) -> String {
    let label = sum.free_label().unwrap_or('r');
    let text = |labels: &[(char, usize)]| labels.iter().map(|l| l.0).collect::<String>();
    let sizes = |labels: &[(char, usize)]| labels.iter().map(|l| l.1).collect::<Vec<_>>();
    let (summed, kept) = (text(&sum.summed), text(&sum.kept));
    let middle: String = sum.result.chars().filter(|c| !kept.contains(*c)).chain([label]).collect();
    let shaped = |value: String, what: &str, shape: Vec<usize>, w: &mut Writer| match shape.len() {
        2 => value,
        _ => w.reshaped(&value, what, &shape),
    };
    let einsum = |equation: String| vec![AttributeProto::string("equation", &equation)];
    let selection = shaped(selection, "select", [sizes(&sum.summed), vec![dims.r]].concat(), w);
    let block = shaped(block.to_string(), "block", [vec![dims.r], sizes(&sum.kept)].concat(), w);
    let to_shards = einsum(format!("{},{summed}{label}->{middle}", sum.x));
    let shards = w.op("Einsum", "shards", &[x, &selection], to_shards);
    let to_outputs = einsum(format!("{middle},{label}{kept}->{}", sum.result));
    w.op("Einsum", "delta", &[&shards, &block], to_outputs)
}

/// The block of a layer's columns `part` as one of all its `outputs` columns: zeros at both sides.
pub(super) fn widened(block: String, r: usize, part: Option<&Range<usize>>, outputs: usize, w: &mut Writer) -> String {
    let Some(part) = part else { return block };
    let sides = [part.start, outputs.saturating_sub(part.end)];
    let [before, after] = sides.map(|n| (n > 0).then(|| w.zeros(r, n)));
    let columns: Vec<&str> =
        [before.as_deref(), Some(block.as_str()), after.as_deref()].into_iter().flatten().collect();
    match columns.len() {
        1 => block,
        _ => w.op("Concat", "columns", &columns, vec![AttributeProto::int("axis", 1)]),
    }
}

/// The nodes of W' from `weight`, of which the variant changes the outputs `part`; returns its name.
pub(super) fn write_weight(
    variant: &dyn Variant,
    (dims, layout): (&Dims, Layout),
    weight: &str,
    parameter: &str,
    (part, outputs): (Option<&Range<usize>>, usize),
    w: &mut Writer,
) -> String {
    let Some(part) = part else { return variant.write_weight(dims, layout, weight, parameter, w) };
    let axis = i64::from(!layout.out_in);
    let axes = w.ints(&[axis]);
    let cut = |range: Range<usize>, w: &mut Writer| {
        let (start, end) = (w.ints(&[range.start as i64]), w.ints(&[range.end as i64]));
        w.op("Slice", "cut", &[weight, &start, &end, &axes], Vec::new())
    };
    let own = cut(part.clone(), w);
    let own = variant.write_weight(dims, layout, &own, parameter, w);
    let mut pieces = vec![own];
    if part.start > 0 {
        pieces.insert(0, cut(0..part.start, w));
    }
    if part.end < outputs {
        pieces.push(cut(part.end..outputs, w));
    }
    let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
    w.op("Concat", "joined", &pieces, vec![AttributeProto::int("axis", axis)])
}
