//! Columns of rows: as files of arrays hold them, or grown row by row out of numbers and lists.

use std::borrow::Cow;

use super::image::Pictures;
use super::record::{Cell, Numbers};
use super::room::{Room, Store, Stored};
use crate::Result;
use crate::onnx::{DataType, Tensor, data_type_name};

/// One column.
#[derive(Debug)]
pub(super) enum Column {
    /// Rows of one shape.
    Dense(Array),
    /// The same in several files, with the place of the first row of each.
    Files(Vec<(usize, Column)>),
    /// Rows of several columns in turn: one of the first, one of the second, …
    Turns(Vec<Column>),
    /// One number for all rows, for an input without axes (a sample rate, a number of steps).
    Single(Array),
    /// Sequences of different lengths, padded per batch.
    Ragged(Ragged),
    /// Images that are decoded when their batch comes.
    Images(Pictures),
}

/// An array as a file holds it: little-endian elements, row-major.
#[derive(Debug)]
pub(super) struct Array {
    pub data_type: DataType,
    pub dims: Vec<usize>,
    pub bytes: Stored,
}

impl Array {
    pub fn tensor(&self) -> Result<Tensor, String> {
        Tensor::from_bytes(self.data_type, &self.dims, &self.bytes.read(0..self.bytes.len())?)
    }

    fn row(&self, at: usize) -> Result<Cow<'_, [u8]>, String> {
        let row = self.bytes.len() / self.dims.first().copied().unwrap_or(0).max(1);
        self.bytes.read(at * row..(at + 1) * row)
    }
}

/// Rows one after the other whose first axis differs in length.
#[derive(Debug)]
pub(super) struct Ragged {
    data_type: DataType,
    /// Shape of what stands at one place of the first axis.
    tail: Vec<usize>,
    /// Where each row ends, in bytes: a [`u64`] each.
    ends: Stored,
    bytes: Stored,
    padding: Padding,
}

const END: usize = size_of::<u64>();

impl Ragged {
    fn rows(&self) -> usize {
        self.ends.len() / END
    }

    /// Where row `at` begins and ends.
    fn range(&self, at: usize) -> Result<std::ops::Range<usize>, String> {
        let from = at.saturating_sub(1) * END;
        let ends = self.ends.read(from..(at + 1) * END)?;
        let mut ends = ends.as_chunks::<END>().0.iter().map(|end| u64::from_le_bytes(*end) as usize);
        let from = if at == 0 { Some(0) } else { ends.next() };
        from.zip(ends.next()).map(|(from, to)| from..to).ok_or_else(|| "a row is missing".into())
    }

    /// Places of the first axis in row `at`, as the file has them.
    fn length(&self, at: usize) -> Result<usize, String> {
        Ok(self.range(at)?.len() / self.stride().max(1))
    }

    /// Bytes of one place of the first axis.
    fn stride(&self) -> usize {
        self.padding.fill.len() * self.tail.iter().product::<usize>()
    }
}

/// How sequences of different lengths become one array.
#[derive(Debug, Clone, Default)]
pub(super) struct Padding {
    /// One element.
    pub fill: Vec<u8>,
    pub left: bool,
    /// The length every batch gets, longer rows being cut; `None`: the longest of the batch.
    pub length: Option<usize>,
}

impl Column {
    pub fn rows(&self) -> usize {
        match self {
            Column::Dense(Array { dims, .. }) => dims.first().copied().unwrap_or(0),
            Column::Files(parts) => parts.iter().map(|(_, part)| part.rows()).sum(),
            Column::Turns(columns) => columns.iter().map(Column::rows).sum(),
            Column::Single(_) => 1,
            Column::Ragged(ragged) => ragged.rows(),
            Column::Images(pictures) => pictures.len(),
        }
    }

    pub fn data_type(&self) -> DataType {
        match self {
            Column::Dense(Array { data_type, .. }) | Column::Single(Array { data_type, .. }) => *data_type,
            Column::Files(parts) => parts.first().map_or(DataType::Undefined, |(_, part)| part.data_type()),
            Column::Turns(columns) => columns.first().map_or(DataType::Undefined, Column::data_type),
            Column::Ragged(ragged) => ragged.data_type,
            Column::Images(pictures) => pictures.data_type(),
        }
    }

    /// Shape of one row; `None` for a length that differs from row to row.
    pub fn row_dims(&self) -> Vec<Option<usize>> {
        match self {
            Column::Dense(Array { dims, .. }) => dims.iter().skip(1).map(|d| Some(*d)).collect(),
            Column::Files(parts) => parts.first().map_or(Vec::new(), |(_, part)| part.row_dims()),
            Column::Turns(columns) => columns.first().map_or(Vec::new(), Column::row_dims),
            Column::Single(_) => Vec::new(),
            Column::Ragged(Ragged { tail, padding, .. }) => {
                std::iter::once(padding.length).chain(tail.iter().map(|d| Some(*d))).collect()
            }
            Column::Images(pictures) => pictures.row_dims().into_iter().map(Some).collect(),
        }
    }

    /// How long row `at` is before it is padded; `None` where all rows are alike.
    pub fn length(&self, at: usize) -> Result<Option<usize>, String> {
        match self {
            Column::Ragged(ragged) if ragged.padding.length.is_none() => ragged.length(at).map(Some),
            _ => Ok(None),
        }
    }

    /// Row `at` of rows of one shape.
    fn row(&self, at: usize) -> Result<Cow<'_, [u8]>, String> {
        match self {
            Column::Dense(array) => array.row(at),
            Column::Files(parts) => {
                let part = parts[..parts.partition_point(|(from, _)| *from <= at)].last();
                part.map_or(Err("a row is missing".into()), |(from, part)| part.row(at - from))
            }
            Column::Turns(columns) => columns[at % columns.len()].row(at / columns.len()),
            _ => Err("its rows are not of one shape".into()),
        }
    }

    /// Shape of row `at` where it is not padded to others; `None`: one number for all rows.
    pub fn row_shape(&self, at: usize) -> Result<Option<Vec<usize>>, String> {
        if let Column::Single(_) = self {
            return Ok(None);
        }
        let length = self.length(at)?.unwrap_or(0);
        Ok(Some(self.row_dims().into_iter().map(|axis| axis.unwrap_or(length)).collect()))
    }

    /// Whether shorter rows are padded before their beginning; `None` where there are none.
    pub fn pads_left(&self) -> Option<bool> {
        match self {
            Column::Ragged(ragged) if ragged.padding.length.is_none() => Some(ragged.padding.left),
            _ => None,
        }
    }

    /// The given rows as one tensor of `data_type`, which is the column's own type or a wider integer one.
    pub fn gather(&self, rows: &[usize], data_type: DataType) -> Result<Tensor, String> {
        let tensor = match self {
            Column::Dense(_) | Column::Files(_) | Column::Turns(_) => {
                let mut picked = Vec::new();
                for at in rows {
                    picked.extend_from_slice(&self.row(*at)?);
                }
                let dims: Vec<usize> =
                    std::iter::once(rows.len()).chain(self.row_dims().into_iter().flatten()).collect();
                Tensor::from_bytes(self.data_type(), &dims, &picked)?
            }
            Column::Single(array) => array.tensor()?,
            Column::Ragged(ragged) => {
                let Ragged { tail, padding, .. } = ragged;
                let picked = rows.iter().map(|at| ragged.bytes.read(ragged.range(*at)?));
                let picked = picked.collect::<Result<Vec<_>, String>>()?;
                let stride = ragged.stride();
                let longest = picked.iter().map(|r| r.len() / stride.max(1)).max().unwrap_or(0);
                let length = padding.length.unwrap_or(longest);
                let mut bytes = padding.fill.repeat(length * picked.len() * tail.iter().product::<usize>());
                for (row, into) in picked.iter().zip(bytes.chunks_mut((length * stride).max(1))) {
                    let used = row.len().min(into.len());
                    let from = if padding.left { into.len() - used } else { 0 };
                    into[from..from + used].copy_from_slice(&row[..used]);
                }
                let dims: Vec<usize> = [rows.len(), length].iter().chain(tail).copied().collect();
                Tensor::from_bytes(ragged.data_type, &dims, &bytes)?
            }
            Column::Images(pictures) => pictures.gather(rows)?,
        };
        widen(tensor, data_type)
    }

    /// The rows of `parts`, one part after the other.
    ///
    /// # Errors
    /// Says what differs from the first part.
    pub fn join(parts: Vec<Self>) -> Result<Self, String> {
        let mut parts = parts.into_iter();
        let first = parts.next().ok_or("it holds no rows")?;
        if parts.len() == 0 {
            return Ok(first);
        }
        if let Column::Single(first) = first {
            let bits = |array: &Array| Ok::<_, String>((array.data_type, array.tensor()?.to_bytes()));
            let bits_of_first = bits(&first)?;
            for part in parts {
                if !matches!(&part, Column::Single(array) if bits(array)? == bits_of_first) {
                    return Err("it is a single number, and not the same one in all files".into());
                }
            }
            return Ok(Column::Single(first));
        }
        let kind = |column: &Column| (column.data_type(), column.row_dims());
        let shape = |column: &Column| {
            let dims: Vec<usize> =
                std::iter::once(column.rows()).chain(column.row_dims().into_iter().flatten()).collect();
            format!("{} of shape {dims:?}", data_type_name(column.data_type()))
        };
        let mut rows = first.rows();
        let mut all = vec![(0, first)];
        for part in parts {
            if let Column::Single(_) = part {
                return Err("it has rows in one file and a single number in another".into());
            }
            if kind(&part) != kind(&all[0].1) {
                return Err(format!("it is {} in one file and {} in another", shape(&all[0].1), shape(&part)));
            }
            let count = part.rows();
            all.push((rows, part));
            rows += count;
        }
        Ok(Column::Files(all))
    }
}

/// A column that grows row by row.
#[derive(Debug)]
pub(super) struct Growing {
    data_type: DataType,
    padding: Padding,
    /// The shape of a row where the model fixes it: a list of as many numbers is taken for it.
    shape: Option<Vec<usize>>,
    /// Whether rows of other lengths are padded.
    pads: bool,
    /// Of the first row.
    dims: Option<Vec<usize>>,
    /// Whether another row has another length.
    ragged: bool,
    rows: usize,
    /// Of each row, where its length may be another than that of the first.
    ends: Store,
    bytes: Store,
}

impl Growing {
    /// A column of scalars, or of rows that are all of one shape.
    pub fn new(data_type: DataType, shape: Option<Vec<usize>>) -> Self {
        let (padding, pads) = (Padding::default(), false);
        let (ends, bytes) = (Store::default(), Store::default());
        Self { data_type, padding, shape, pads, dims: None, ragged: false, rows: 0, ends, bytes }
    }

    /// A column whose rows may differ in length.
    pub fn padded(data_type: DataType, padding: Padding) -> Self {
        Self { padding, pads: true, ..Self::new(data_type, None) }
    }

    /// Appends the numbers in `cell`, or says what it is.
    pub fn push_cell(&mut self, cell: &Cell) -> Result<(), String> {
        match cell {
            Cell::Null => Err("is empty; every row needs a value".into()),
            Cell::Array { dims, numbers } => self.push(dims, numbers),
            _ => self.push(&[], &number(cell)?),
        }
    }

    /// Appends a row of this shape.
    pub fn push(&mut self, dims: &[usize], numbers: &Numbers) -> Result<(), String> {
        let dims = match &self.shape {
            Some(shape) if shape.iter().product::<usize>() == numbers.len() => shape.as_slice(),
            _ => dims,
        };
        let first = self.dims.get_or_insert_with(|| dims.to_vec());
        if first != dims {
            // Without its first axis, which may differ where rows are padded.
            if !self.pads || dims.is_empty() || first.len() != dims.len() || first[1..] != dims[1..] {
                return Err(format!("has shape {dims:?}, but {first:?} in the first row"));
            }
            self.ragged = true;
        }
        put(numbers, self.data_type, self.bytes.tail())?;
        if self.pads {
            self.ends.tail().extend(self.bytes.len().to_le_bytes());
        }
        self.rows += 1;
        Ok(())
    }

    /// What it has grown by, for [`Room::settle`].
    pub fn stores(&mut self) -> [&mut Store; 2] {
        [&mut self.ends, &mut self.bytes]
    }

    pub fn finish(self, room: &Room) -> Result<Column> {
        let Self { data_type, padding, dims, ragged, rows, ends, bytes, .. } = self;
        let dims = dims.unwrap_or_default();
        let bytes = bytes.finish(room)?;
        if ragged || padding.length.is_some() {
            let tail = dims.get(1..).unwrap_or_default().to_vec();
            return Ok(Column::Ragged(Ragged { data_type, tail, ends: ends.finish(room)?, bytes, padding }));
        }
        let dims = std::iter::once(rows).chain(dims).collect();
        Ok(Column::Dense(Array { data_type, dims, bytes }))
    }
}

/// The number that a cell holds.
pub(super) fn number(cell: &Cell) -> Result<Numbers, String> {
    match cell {
        Cell::Int(v) => Ok(Numbers::Int(vec![*v])),
        Cell::Float(v) => Ok(Numbers::Float(vec![*v])),
        Cell::Raw(text) => {
            let text = text.trim();
            let int = match text {
                "true" | "True" | "TRUE" => Some(1),
                "false" | "False" | "FALSE" => Some(0),
                _ => text.parse().ok(),
            };
            match (int, text.parse()) {
                (Some(int), _) => Ok(Numbers::Int(vec![int])),
                (None, Ok(float)) => Ok(Numbers::Float(vec![float])),
                _ => Err(format!("is {cell}, but a number is wanted")),
            }
        }
        Cell::Null => Err("is empty; every row needs a number".into()),
        _ => Err(format!("is {cell}, but a number is wanted")),
    }
}

/// Appends numbers as elements of type `to`; none of them may change its value, but for the rounding of floats.
fn put(numbers: &Numbers, to: DataType, out: &mut Vec<u8>) -> Result<(), String> {
    macro_rules! integers {
        ($type:ty) => {
            each(numbers, to, out, |v| <$type>::try_from(v).ok(), |v| <$type>::to_le_bytes(v))
        };
    }
    macro_rules! floats {
        ($from:expr) => {{
            match numbers {
                Numbers::Int(all) => all.iter().for_each(|v| out.extend($from(*v as f64).to_le_bytes())),
                Numbers::Float(all) => all.iter().for_each(|v| out.extend($from(*v).to_le_bytes())),
            }
            Ok(())
        }};
    }
    match to {
        DataType::Float => floats!(|v| v as f32),
        DataType::Double => floats!(|v: f64| v),
        DataType::Float16 => floats!(half::f16::from_f64),
        DataType::Bfloat16 => floats!(half::bf16::from_f64),
        DataType::Int64 => integers!(i64),
        DataType::Int32 => integers!(i32),
        DataType::Int16 => integers!(i16),
        DataType::Int8 => integers!(i8),
        DataType::Uint64 => integers!(u64),
        DataType::Uint32 => integers!(u32),
        DataType::Uint16 => integers!(u16),
        DataType::Uint8 => integers!(u8),
        DataType::Bool => each(numbers, to, out, |v| u8::try_from(v).ok().filter(|v| *v < 2), |v| [v]),
        other => Err(format!("would have to be {}, which is not made from numbers", data_type_name(other))),
    }
}

fn each<T, const N: usize>(
    numbers: &Numbers,
    to: DataType,
    out: &mut Vec<u8>,
    convert: impl Fn(i64) -> Option<T>,
    bytes: impl Fn(T) -> [u8; N],
) -> Result<(), String> {
    let refused = |v: String| format!("holds {v}, but {} is wanted", data_type_name(to));
    match numbers {
        Numbers::Int(all) => all.iter().try_for_each(|v| {
            out.extend(bytes(convert(*v).ok_or_else(|| refused(v.to_string()))?));
            Ok(())
        }),
        Numbers::Float(all) => all.iter().try_for_each(|v| {
            // 2^53: beyond it, a float stands for several integers.
            let whole = (v.fract() == 0.0 && v.abs() <= 9_007_199_254_740_992.0).then_some(*v as i64);
            out.extend(bytes(whole.and_then(&convert).ok_or_else(|| refused(v.to_string()))?));
            Ok(())
        }),
    }
}

/// True where every value of integer type `from` is one of integer type `to`, or the types are the same.
pub(super) fn widens(from: DataType, to: DataType) -> bool {
    use DataType::*;
    from == to
        || matches!((from, to), (Int8 | Uint8 | Int16 | Uint16 | Int32 | Uint32, Int64))
        || matches!((from, to), (Int8 | Uint8 | Int16 | Uint16, Int32))
}

fn widen(tensor: Tensor, to: DataType) -> Result<Tensor, String> {
    if tensor.data_type() == to {
        return Ok(tensor);
    }
    let integers = match &tensor {
        Tensor::I8(a) => a.mapv(i64::from),
        Tensor::U8(a) => a.mapv(i64::from),
        Tensor::I16(a) => a.mapv(i64::from),
        Tensor::U16(a) => a.mapv(i64::from),
        Tensor::I32(a) => a.mapv(i64::from),
        Tensor::U32(a) => a.mapv(i64::from),
        Tensor::I64(a) => a.clone(),
        _ => return Err(format!("{} cannot become {}", data_type_name(tensor.data_type()), data_type_name(to))),
    };
    match to {
        DataType::Int64 => Ok(integers.into()),
        DataType::Int32 => Ok(integers.mapv(|v| v as i32).into()),
        _ => Err(format!("{} cannot become {}", data_type_name(tensor.data_type()), data_type_name(to))),
    }
}
