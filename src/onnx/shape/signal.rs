//! Fourier transforms, sampling of images at places, and classical models.

use super::op::{Op, Rules, known};
use super::{DataType, Dim};

pub(super) const RULES: Rules = &[
    (&["DFT"], dft),
    (&["STFT"], stft),
    (&["DeformConv"], deform_conv),
    (&["MaxRoiPool"], max_roi_pool),
    (&["Col2Im"], col2im),
    (&["MaxUnpool", "CenterCropPad"], same_rank),
    (&["ai.onnx.ml:Scaler", "ai.onnx.ml:Normalizer"], in_float),
    (&["ai.onnx.ml:Imputer", "ai.onnx.ml:Binarizer"], same),
    (&["ai.onnx.ml:LinearRegressor", "ai.onnx.ml:SVMRegressor"], regressor),
    (&["ai.onnx.ml:LinearClassifier"], classifier),
    (&["ai.onnx.ml:FeatureVectorizer"], vectorizer),
    (&["ai.onnx.ml:ArrayFeatureExtractor"], extractor),
];

/// `x` numbers of which one more than half remain in a transform of a real signal.
fn half(op: &mut Op, x: Dim) -> Dim {
    match x {
        Dim::Known(n) => Dim::Known(n / 2 + 1),
        Dim::Symbol(_) => op.fresh(),
    }
}

fn dft(op: &mut Op) -> Option<()> {
    op.out(None);
    let mut dims = op.dims(0)?;
    let (inverse, onesided) = (op.node.attr_i("inverse", 0) != 0, op.node.attr_i("onesided", 0) != 0);
    let last = dims.len().checked_sub(1)?;
    dims[last] = Dim::Known(if inverse && onesided { 1 } else { 2 });
    let axis = match op.opset {
        20.. if op.has(2) => op.ints(2).and_then(|axis| axis.first().copied()),
        20.. => Some(-2),
        _ => Some(op.node.attr_i("axis", 1)),
    };
    let Some(axis) = axis.and_then(|axis| super::op::axis(axis, dims.len())) else {
        // Any of them may have changed.
        let open = op.unknown(last);
        op.out(Some([open, vec![dims[last]]].concat()));
        return Some(());
    };
    let length = match op.elements(1).and_then(|length| length.first().copied()) {
        Some(length) => length,
        None if op.has(1) || (inverse && onesided) => op.fresh(),
        None => dims[axis],
    };
    dims[axis] = if onesided && !inverse { half(op, length) } else { length };
    op.out(Some(dims));
    Some(())
}

fn stft(op: &mut Op) -> Option<()> {
    op.out(None);
    let batch = *op.dims(0)?.first()?;
    let window = op.dims(2).and_then(|dims| dims.first().copied());
    let length = op.elements(3).and_then(|length| length.first().copied()).or(window);
    let length = length.unwrap_or_else(|| op.fresh());
    let bins = if op.node.attr_i("onesided", 1) != 0 { half(op, length) } else { length };
    let frames = op.fresh();
    op.out(Some(vec![batch, frames, bins, Dim::Known(2)]));
    Some(())
}

fn deform_conv(op: &mut Op) -> Option<()> {
    op.out(None);
    let (batch, channels) = (*op.dims(0)?.first()?, *op.dims(1)?.first()?);
    let places = op.dims(2)?.get(2..)?.to_vec();
    op.out(Some([vec![batch, channels], places].concat()));
    Some(())
}

fn max_roi_pool(op: &mut Op) -> Option<()> {
    op.out(None);
    let (channels, count) = (*op.dims(0)?.get(1)?, *op.dims(1)?.first()?);
    let pooled = op.node.attr_ints("pooled_shape")?.iter().map(|n| Dim::Known(*n)).collect();
    op.out(Some([vec![count, channels], pooled].concat()));
    Some(())
}

fn col2im(op: &mut Op) -> Option<()> {
    op.out(None);
    let (batch, columns) = (*op.dims(0)?.first()?, *op.dims(0)?.get(1)?);
    let block = op.ints(2).and_then(|block| block.iter().try_fold(1i64, |n, k| n.checked_mul(*k)));
    let channels = match (columns, block) {
        (Dim::Known(n), Some(block)) => n.checked_div(block).map(Dim::Known),
        _ => None,
    };
    let channels = channels.unwrap_or_else(|| op.fresh());
    let image = match op.elements(1) {
        Some(image) => image,
        None => {
            let count = known(*op.dims(1)?.first()?)?;
            op.unknown(usize::try_from(count).ok().filter(|n| *n <= 8)?)
        }
    };
    op.out(Some([vec![batch, channels], image].concat()));
    Some(())
}

fn same_rank(op: &mut Op) -> Option<()> {
    op.out(None);
    let rank = op.rank(0)?;
    let dims = op.unknown(rank);
    op.out(Some(dims));
    Some(())
}

fn same(op: &mut Op) -> Option<()> {
    let dims = op.dims(0);
    op.out(dims);
    Some(())
}

fn in_float(op: &mut Op) -> Option<()> {
    let dims = op.dims(0);
    op.set(0, Some(DataType::Float), dims);
    Some(())
}

/// Rows of the input, of which one axis may be left out where there is one row.
fn batch(op: &mut Op) -> Dim {
    match op.dims(0).as_deref() {
        Some([batch, _]) => *batch,
        _ => op.fresh(),
    }
}

fn regressor(op: &mut Op) -> Option<()> {
    let rows = batch(op);
    let targets = op.node.attr_i("targets", 1);
    op.set(0, Some(DataType::Float), Some(vec![rows, Dim::Known(targets)]));
    Some(())
}

fn classifier(op: &mut Op) -> Option<()> {
    let rows = batch(op);
    let (ints, strings) = (op.node.attr("classlabels_ints"), op.node.attr("classlabels_strings"));
    let (ints, strings) = (ints.map_or(0, |a| a.ints.len()), strings.map_or(0, |a| a.strings.len()));
    let label = if strings > 0 { DataType::String } else { DataType::Int64 };
    op.set(0, Some(label), Some(vec![rows]));
    op.set(1, Some(DataType::Float), Some(vec![rows, Dim::Known(ints.max(strings) as i64)]));
    Some(())
}

fn vectorizer(op: &mut Op) -> Option<()> {
    let rows = batch(op);
    let widths = op.node.attr_ints("inputdimensions").unwrap_or_default();
    let width = widths.iter().try_fold(0i64, |n, width| n.checked_add(*width)).map(Dim::Known);
    let width = width.unwrap_or_else(|| op.fresh());
    op.set(0, Some(DataType::Float), Some(vec![rows, width]));
    Some(())
}

fn extractor(op: &mut Op) -> Option<()> {
    op.out(None);
    let (x, columns) = (op.dims(0)?, op.dims(1)?);
    let count = op.symbols().product(&columns);
    let (_, outer) = x.split_last()?;
    let outer = if outer.is_empty() { &[Dim::Known(1)] } else { outer };
    op.out(Some([outer, &[count]].concat()));
    Some(())
}
