//! Where an array lies in a `.npz`, which is a zip archive of `.npy` files: those that `numpy.savez` stored, in row-major
//! order, can be read in place, however large they are.

use std::ops::Range;

use bytes::Bytes;

use super::Array;
use super::room::Stored;
use crate::onnx::DataType;

/// NumPy's names of the types whose elements lie as a tensor has them.
const TYPES: [(&str, DataType, usize); 11] = [
    ("<f4", DataType::Float, 4),
    ("<f8", DataType::Double, 8),
    ("<i8", DataType::Int64, 8),
    ("<i4", DataType::Int32, 4),
    ("<i2", DataType::Int16, 2),
    ("|i1", DataType::Int8, 1),
    ("<u8", DataType::Uint64, 8),
    ("<u4", DataType::Uint32, 4),
    ("<u2", DataType::Uint16, 2),
    ("|u1", DataType::Uint8, 1),
    ("|b1", DataType::Bool, 1),
];

/// The array `name` of `archive` where it lies; `None` where it has to be decoded.
pub(super) fn in_place(archive: &Bytes, name: &str) -> Option<Array> {
    let data = archive.slice(stored(archive, &[name, ".npy"].concat())?);
    let (major, header) = (*data.get(6)?, data.strip_prefix(b"\x93NUMPY")?);
    let (from, len): (usize, usize) = match major {
        1 => (10, number(header, 2, 2)?),
        _ => (12, number(header, 2, 4)?),
    };
    let header = std::str::from_utf8(data.get(from..from.checked_add(len)?)?).ok()?;
    let value = |key: &str, end: char| Some(header.split_once(key)?.1.split_once(end)?.0);
    let descriptor = value("'descr': '", '\'')?;
    let (_, data_type, size) = TYPES.iter().find(|(known, ..)| *known == descriptor)?;
    if value("'fortran_order': ", ',')? != "False" {
        return None;
    }
    let shape = value("'shape': (", ')')?.split(',').map(str::trim).filter(|n| !n.is_empty());
    let dims = shape.map(|n| n.parse().ok()).collect::<Option<Vec<usize>>>()?;
    let elements = data.slice(from + len..);
    let wanted = dims.iter().try_fold(*size, |n, dim| n.checked_mul(*dim))?;
    (elements.len() == wanted).then(|| Array { data_type: *data_type, dims, bytes: Stored::Memory(elements) })
}

/// The little-endian number of `len` bytes at `at`.
fn number(bytes: &[u8], at: usize, len: usize) -> Option<usize> {
    let bytes = bytes.get(at..at.checked_add(len)?)?;
    usize::try_from(bytes.iter().rev().fold(0u64, |n, byte| (n << 8) | u64::from(*byte))).ok()
}

/// Where the content of the file `name` lies, if it is not compressed (APPNOTE 4.3.7 to 4.3.16, 4.5.3).
fn stored(archive: &[u8], name: &str) -> Option<Range<usize>> {
    let part = |at: usize, mark: &[u8; 4]| archive.get(at..).filter(|part| part.starts_with(mark));
    let last = archive.len().checked_sub(22)?;
    let end =
        (last.saturating_sub(usize::from(u16::MAX))..=last).rev().find(|at| part(*at, b"PK\x05\x06").is_some())?;
    let (mut count, mut at) = (number(archive, end + 10, 2)?, number(archive, end + 16, 4)?);
    if let Some(locator) = end.checked_sub(20).and_then(|at| part(at, b"PK\x06\x07")) {
        let end = part(number(locator, 8, 8)?, b"PK\x06\x06")?;
        (count, at) = (number(end, 32, 8)?, number(end, 48, 8)?);
    }
    for _ in 0..count {
        let entry = part(at, b"PK\x01\x02")?;
        let [name_len, extra_len, comment_len] = [28, 30, 32].map(|at| number(entry, at, 2));
        let (name_len, extra_len) = (name_len?, extra_len?);
        if entry.get(46..46 + name_len)? == name.as_bytes() {
            if number(entry, 10, 2)? != 0 {
                return None;
            }
            let extra = entry.get(46 + name_len..46 + name_len + extra_len)?;
            let mut wide = zip64(extra).chunks_exact(8).map(|bytes| number(bytes, 0, 8));
            // Sizes before and after, and the place of the file: the ones that do not fit are in the extra field.
            let [len, _, header] = [24, 20, 42].map(|at| match number(entry, at, 4) {
                Some(0xffff_ffff) => wide.next().flatten(),
                narrow => narrow,
            });
            let header_at = header?;
            let header = part(header_at, b"PK\x03\x04")?;
            let from = header_at + 30 + number(header, 26, 2)? + number(header, 28, 2)?;
            let range = from..from.checked_add(len?)?;
            return (range.end <= archive.len()).then_some(range);
        }
        at = at.checked_add(46 + name_len + extra_len + comment_len?)?;
    }
    None
}

/// The numbers of 8 bytes in an entry's extra fields, which may be none.
fn zip64(mut extra: &[u8]) -> &[u8] {
    while let (Some(kind), Some(len)) = (number(extra, 0, 2), number(extra, 2, 2)) {
        let Some(field) = extra.get(4..4 + len) else { break };
        if kind == 1 {
            return field;
        }
        extra = &extra[4 + len..];
    }
    &[]
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use ndarray::{Array2, ShapeBuilder};
    use ndarray_npy::NpzWriter;

    use super::*;

    fn archive(compressed: bool) -> Bytes {
        let mut bytes = Cursor::new(Vec::new());
        let mut npz = if compressed { NpzWriter::new_compressed(&mut bytes) } else { NpzWriter::new(&mut bytes) };
        npz.add_array("first", &ndarray::arr0(7u8)).unwrap();
        npz.add_array("x", &Array2::from_shape_fn((3, 2), |(i, j)| (2 * i + j) as f32)).unwrap();
        npz.add_array("columns", &Array2::<i64>::zeros((3, 2).f())).unwrap();
        npz.finish().unwrap();
        bytes.into_inner().into()
    }

    fn is_x(array: Option<Array>) -> bool {
        let x = array.map(|array| array.tensor().unwrap());
        x.is_some_and(|x| x == crate::onnx::Tensor::new(&[3, 2], vec![0f32, 1.0, 2.0, 3.0, 4.0, 5.0]))
    }

    #[test]
    fn what_is_stored_as_it_is_is_found_and_nothing_else() {
        let whole = archive(false);
        assert!(is_x(in_place(&whole, "x")));
        assert_eq!(in_place(&whole, "first").unwrap().dims, [0; 0]);
        assert!(in_place(&whole, "columns").is_none() && in_place(&whole, "y").is_none());
        assert!(in_place(&archive(true), "x").is_none());
        for len in 0..whole.len() {
            assert!(in_place(&whole.slice(..len), "x").is_none(), "{len}");
        }
    }

    #[test]
    fn sizes_and_places_beyond_4_gib_are_in_the_extra_field() {
        let whole = archive(false);
        let range = stored(&whole, "x.npy").unwrap();
        // The same content behind a local header at 10, with all that may be wide in the central entry's extra field.
        let mut zip = vec![0; 10];
        let le = |zip: &mut Vec<u8>, numbers: &[(u64, usize)]| {
            numbers.iter().for_each(|(n, len)| zip.extend(&n.to_le_bytes()[..*len]));
        };
        zip.extend(b"PK\x03\x04");
        zip.resize(10 + 26, 0);
        le(&mut zip, &[(5, 2), (0, 2)]);
        zip.extend(b"x.npy");
        zip.extend(&whole[range.clone()]);
        let central = zip.len();
        zip.extend(b"PK\x01\x02");
        zip.resize(central + 20, 0);
        le(
            &mut zip,
            &[(0xffff_ffff, 4), (0xffff_ffff, 4), (5, 2), (4 + 5 + 4 + 24, 2), (0, 8), (0, 2), (0xffff_ffff, 4)],
        );
        zip.extend(b"x.npy");
        let len = range.len() as u64;
        le(&mut zip, &[(9, 2), (5, 2), (0, 5), (1, 2), (24, 2), (len, 8), (len, 8), (10, 8)]);
        let end = zip.len();
        zip.extend(b"PK\x06\x06");
        zip.resize(end + 32, 0);
        le(&mut zip, &[(1, 8), (0, 8), (central as u64, 8)]);
        zip.extend(b"PK\x06\x07");
        le(&mut zip, &[(0, 4), (end as u64, 8), (1, 4)]);
        zip.extend(b"PK\x05\x06");
        le(&mut zip, &[(0, 4), (0xffff, 2), (0xffff, 2), (0xffff_ffff, 4), (0xffff_ffff, 4), (0, 2)]);
        assert!(is_x(in_place(&zip.into(), "x")));
    }
}
