//! Rows of a value: cut out of what a batch gave, and put together again for another batch.

use crate::onnx::{DataType, Tensor};

/// What a value holds for one row of the data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Row {
    /// The value's, with the row's own part of the axis of rows.
    pub dims: Vec<usize>,
    /// Little-endian, row-major.
    pub bytes: Vec<u8>,
}

/// The `count` rows that follow each other on `axis` of `value`, each as long as the others.
pub(super) fn cut(value: &Tensor, axis: usize, count: usize) -> Result<Vec<Row>, String> {
    let whole = value.dims();
    let length = whole.get(axis).filter(|n| *n % count.max(1) == 0).map(|n| n / count.max(1));
    let length = length.ok_or_else(|| format!("has shape {whole:?}, not {count} rows on axis {axis}"))?;
    let (bytes, unit) = (value.to_bytes(), unit(value.byte_len(), whole));
    let mut dims = whole.to_vec();
    dims[axis] = length;
    let row = |at: usize| {
        let mut row = Row { dims: dims.clone(), bytes: vec![0; dims.iter().product::<usize>() * unit] };
        let mut from = vec![0; dims.len()];
        from[axis] = at * length;
        let into = vec![0; dims.len()];
        copy((&bytes, whole, &from), (&mut row.bytes, &dims, &into), &dims, unit);
        row
    };
    Ok((0..count).map(row).collect())
}

/// The rows behind each other on `axis`, with zeros behind what is shorter than others on any axis (before it, where
/// data is padded on the left).
pub(super) fn stack(rows: &[Row], axis: usize, element: DataType, left: bool) -> Result<Tensor, String> {
    let first = rows.first().ok_or("there are no rows")?;
    let mut longest = first.dims.clone();
    for row in rows {
        if row.dims.len() != longest.len() {
            return Err(format!("rows have shapes {:?} and {:?}", first.dims, row.dims));
        }
        longest.iter_mut().zip(&row.dims).for_each(|(longest, n)| *longest = (*longest).max(*n));
    }
    let mut whole = longest.clone();
    whole[axis] *= rows.len();
    let empty = Tensor::zeros(element, &whole)?;
    let unit = unit(empty.byte_len(), &whole);
    let mut bytes = vec![0; empty.byte_len()];
    for (at, row) in rows.iter().enumerate() {
        let mut into: Vec<usize> =
            longest.iter().zip(&row.dims).map(|(longest, n)| if left { longest - n } else { 0 }).collect();
        into[axis] += at * longest[axis];
        copy((&row.bytes, &row.dims, &vec![0; into.len()]), (&mut bytes, &whole, &into), &row.dims, unit);
    }
    Tensor::from_bytes(element, &whole, &bytes)
}

/// Bytes of one number.
fn unit(bytes: usize, dims: &[usize]) -> usize {
    bytes / dims.iter().product::<usize>().max(1)
}

/// Copies a box of `size` from one array into another, each given with its shape and where the box begins in it.
fn copy(from: (&[u8], &[usize], &[usize]), into: (&mut [u8], &[usize], &[usize]), size: &[usize], unit: usize) {
    let (source, source_dims, source_at) = from;
    let (target, target_dims, target_at) = into;
    let Some((run, outer)) = size.split_last() else { return target.copy_from_slice(source) };
    let place = |dims: &[usize], start: &[usize], index: &[usize]| {
        let axes = dims.iter().zip(start).zip(index.iter().chain([&0]));
        axes.fold(0, |place, ((n, start), i)| place * n + start + i) * unit
    };
    let mut index = vec![0; outer.len()];
    for _ in 0..outer.iter().product::<usize>() {
        let (a, b) = (place(source_dims, source_at, &index), place(target_dims, target_at, &index));
        target[b..b + run * unit].copy_from_slice(&source[a..a + run * unit]);
        for (i, n) in index.iter_mut().zip(outer).rev() {
            *i += 1;
            if *i < *n {
                break;
            }
            *i = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counted(dims: &[usize]) -> Tensor {
        Tensor::new(dims, (0..dims.iter().product::<usize>()).map(|i| i as f32).collect())
    }

    #[test]
    fn rows_come_back_as_they_were_on_any_axis() {
        for (dims, axis, count) in [(&[3, 2, 4][..], 0, 3), (&[2, 3, 4], 1, 3), (&[2, 6], 1, 3), (&[6], 0, 2)] {
            let value = counted(dims);
            let rows = cut(&value, axis, count).unwrap();
            assert_eq!(rows.len(), count);
            assert_eq!(stack(&rows, axis, DataType::Float, false).unwrap(), value, "{dims:?}");
        }
        // The second of the three rows on the middle axis.
        let rows = cut(&counted(&[2, 3, 2]), 1, 3).unwrap();
        assert_eq!(Tensor::from_bytes(DataType::Float, &[4], &rows[1].bytes).unwrap().to_f64(), [2.0, 3.0, 8.0, 9.0]);
        assert_eq!(rows[1].dims, [2, 1, 2]);
        let complaint = cut(&counted(&[3, 2]), 0, 2).unwrap_err();
        assert!(complaint.contains("[3, 2]"), "{complaint}");
    }

    #[test]
    fn shorter_rows_are_padded_with_zeros_on_the_side_of_the_data() {
        let row = |dims: &[usize], values: &[f32]| Row {
            dims: dims.to_vec(),
            bytes: values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        };
        let rows = [row(&[1, 2], &[1.0, 2.0]), row(&[1, 3], &[3.0, 4.0, 5.0])];
        let stacked = |left| stack(&rows, 0, DataType::Float, left).unwrap();
        assert_eq!(stacked(false), Tensor::new(&[2, 3], vec![1f32, 2.0, 0.0, 3.0, 4.0, 5.0]));
        assert_eq!(stacked(true), Tensor::new(&[2, 3], vec![0f32, 1.0, 2.0, 3.0, 4.0, 5.0]));
        // Tokens of all rows on one axis.
        let rows = [row(&[2], &[1.0, 2.0]), row(&[3], &[3.0, 4.0, 5.0])];
        let stacked = |left| stack(&rows, 0, DataType::Float, left).unwrap();
        assert_eq!(stacked(false), Tensor::new(&[6], vec![1f32, 2.0, 0.0, 3.0, 4.0, 5.0]));
        assert_eq!(stacked(true), Tensor::new(&[6], vec![0f32, 1.0, 2.0, 3.0, 4.0, 5.0]));
    }
}
