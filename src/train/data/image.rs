//! Images: decoded, resized and normalised as a model's input wants them, when their batch comes.

use std::fmt::{self, Display, Formatter};
use std::fs::File;
use std::io::{BufRead, BufReader, Cursor, Seek};
use std::ops::Range;
use std::path::{Path, PathBuf};

use image::imageops::{FilterType, resize};
use image::{DynamicImage, ImageReader};

use super::record::{At, Cell, Place};
use super::room::{Room, Store, Stored};
use super::{Axis, Field};
use crate::onnx::{DataType, Tensor, data_type_name};
use crate::{Error, Result};

/// How images become numbers.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ImageOptions {
    /// The column with images, or with their paths; `None`: the only one of images, else `image`.
    pub field: Option<String>,
    /// Width and height that every image is resized to; `None`: those of the model's input.
    pub size: Option<(usize, usize)>,
    /// Taken off each channel of values from 0 to 1; `None`: ImageNet's for colours, else 0.
    pub mean: Option<Vec<f32>>,
    /// What each channel is divided by after that; `None`: ImageNet's for colours, else 1.
    pub std: Option<Vec<f32>>,
}

const IMAGENET_MEAN: [f32; 3] = [0.485, 0.456, 0.406];
const IMAGENET_STD: [f32; 3] = [0.229, 0.224, 0.225];

/// The shape and the scale of one input.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Transform {
    data_type: DataType,
    /// Colours before height and width.
    channels_first: bool,
    /// 1 (grey) or 3.
    channels: usize,
    height: usize,
    width: usize,
    mean: Vec<f32>,
    std: Vec<f32>,
}

impl Transform {
    /// For `input`; `None` where it does not take images.
    pub fn new(input: &Field, options: &ImageOptions) -> Result<Option<Self>> {
        let Some([_, a, b, c]) = input.dims.as_deref() else { return Ok(None) };
        let channels = |axis: &Axis| match axis {
            Axis::Known(n @ (1 | 3)) => Some(*n),
            _ => None,
        };
        // Exporters of PyTorch models leave all axes open at times; its images have their colours first.
        let (channels_first, channels, height, width) = match (channels(a), channels(c)) {
            (Some(n), _) => (true, n, b, c),
            (None, Some(n)) => (false, n, a, b),
            (None, None) if !matches!(a, Axis::Known(_)) => (true, 3, b, c),
            _ => return Ok(None),
        };
        let bad = |what: String| Error::config(format!("image input {}: {what}", input.name));
        let side = |axis: &Axis, name: &str, wanted: Option<usize>| match (axis, wanted) {
            (Axis::Known(n), Some(wanted)) if *n != wanted => {
                Err(bad(format!("its {name} is fixed to {n}, so the image-size cannot be {wanted}")))
            }
            (Axis::Known(n), _) => Ok(*n),
            (_, Some(wanted)) => Ok(wanted),
            (_, None) => Err(bad(format!("its {name} is open; say what images are resized to with --image-size"))),
        };
        let height = side(height, "height", options.size.map(|(_, h)| h))?;
        let width = side(width, "width", options.size.map(|(w, _)| w))?;
        let data_type = input.data_type.unwrap_or(DataType::Float);
        let raw = data_type == DataType::Uint8;
        if !raw && !matches!(data_type, DataType::Float | DataType::Float16 | DataType::Bfloat16 | DataType::Double) {
            return Err(bad(format!("images are floats or uint8, and it takes {}", data_type_name(data_type))));
        }
        if raw && (options.mean.is_some() || options.std.is_some()) {
            return Err(bad("it takes uint8, which has no image-mean and image-std".into()));
        }
        let values = |given: &Option<Vec<f32>>, flag: &str, colours: [f32; 3], grey: f32| match given.as_deref() {
            None if channels == 3 => Ok(colours.to_vec()),
            None => Ok(vec![grey]),
            Some([one]) => Ok(vec![*one; channels]),
            Some(all) if all.len() == channels => Ok(all.to_vec()),
            Some(all) => Err(bad(format!("{flag} has {} numbers for {channels} channels", all.len()))),
        };
        let mean = values(&options.mean, "image-mean", IMAGENET_MEAN, 0.0)?;
        let std = values(&options.std, "image-std", IMAGENET_STD, 1.0)?;
        Ok(Some(Self { data_type, channels_first, channels, height, width, mean, std }))
    }

    fn dims(&self) -> [usize; 3] {
        match self.channels_first {
            true => [self.channels, self.height, self.width],
            false => [self.height, self.width, self.channels],
        }
    }

    /// The pixels as `datasets` and Pillow give them, in rows of colours, then resized (bilinear, as Pillow's).
    fn pixels(&self, image: DynamicImage) -> Vec<u8> {
        let (width, height) = (self.width as u32, self.height as u32);
        if self.channels == 3 {
            let image = image.into_rgb8();
            let same = image.dimensions() == (width, height);
            return if same { image } else { resize(&image, width, height, FilterType::Triangle) }.into_raw();
        }
        let image = match image {
            DynamicImage::ImageLuma8(grey) => grey,
            image @ (DynamicImage::ImageLumaA8(_) | DynamicImage::ImageLuma16(_) | DynamicImage::ImageLumaA16(_)) => {
                image.into_luma8()
            }
            image => {
                let colours = image.into_rgb8();
                // ITU-R 601-2, as Pillow's `convert("L")`.
                let grey = |p: &image::Rgb<u8>| {
                    let [r, g, b] = p.0.map(u32::from);
                    ((r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16) as u8
                };
                let (width, height) = colours.dimensions();
                let pixels = colours.pixels().map(grey).collect();
                image::GrayImage::from_raw(width, height, pixels).unwrap_or_default()
            }
        };
        let same = image.dimensions() == (width, height);
        if same { image } else { resize(&image, width, height, FilterType::Triangle) }.into_raw()
    }

    /// Writes an image's row of the batch.
    fn write(&self, pixels: &[u8], out: &mut [f32]) {
        let (channels, area) = (self.channels, self.height * self.width);
        for (at, colours) in pixels.chunks_exact(channels).enumerate() {
            for (channel, value) in colours.iter().enumerate() {
                let place = if self.channels_first { channel * area + at } else { at * channels + channel };
                let value = f32::from(*value);
                out[place] = match self.data_type {
                    DataType::Uint8 => value,
                    _ => (value / 255.0 - self.mean[channel]) / self.std[channel],
                };
            }
        }
    }
}

/// An image that was not decoded yet.
#[derive(Debug)]
struct Picture {
    source: Source,
    /// The row that it stands in.
    place: Place,
}

#[derive(Debug)]
enum Source {
    File(PathBuf),
    /// Among the bytes that are kept.
    Kept(Range<usize>),
}

/// What a message calls it.
impl Display for Picture {
    fn fmt(&self, f: &mut Formatter) -> fmt::Result {
        match (&self.source, self.place.at) {
            (Source::File(path), At::Whole) => write!(f, "{}", path.display()),
            (Source::File(path), _) => write!(f, "{}: {}", self.place, path.display()),
            (Source::Kept(_), _) => write!(f, "{}", self.place),
        }
    }
}

fn open(path: &Path) -> Result<BufReader<File>, String> {
    File::open(path).map(BufReader::new).map_err(|e| format!("{}: cannot open: {e}", path.display()))
}

/// Fails where the image called `name` is none by its first bytes.
fn check(image: impl BufRead + Seek, name: impl Display) -> Result<(), String> {
    let told = |e: &dyn Display| format!("{name}: this is no image that can be read ({e})");
    let reader = ImageReader::new(image).with_guessed_format().map_err(|e| told(&e))?;
    reader.into_dimensions().map(|_| ()).map_err(|e| told(&e))
}

fn decode(image: impl BufRead + Seek, name: impl Display) -> Result<DynamicImage, String> {
    let told = |e: &dyn Display| format!("{name}: this is no whole image ({e})");
    let reader = ImageReader::new(image).with_guessed_format().map_err(|e| told(&e))?;
    reader.decode().map_err(|e| told(&e))
}

/// A column of images that grows row by row.
pub(super) struct Album {
    transform: Transform,
    all: Vec<Picture>,
    kept: Store,
}

impl Album {
    pub fn new(transform: Transform) -> Self {
        Self { transform, all: Vec::new(), kept: Store::default() }
    }

    /// Appends the image, or the path of one beside the file of the row.
    pub fn push(&mut self, cell: Cell, place: &Place) -> Result<(), String> {
        let bad = |what: String| format!("holds an image that cannot be used: {what}");
        let path = match cell {
            Cell::File(path) => path,
            Cell::Raw(path) | Cell::Text(path) => {
                place.path.parent().map_or_else(|| path.clone().into(), |dir| dir.join(&path))
            }
            Cell::Bytes(bytes) => {
                check(Cursor::new(&bytes), place).map_err(bad)?;
                let from = self.kept.len() as usize;
                self.kept.tail().extend(&bytes);
                let source = Source::Kept(from..from + bytes.len());
                self.all.push(Picture { source, place: place.clone() });
                return Ok(());
            }
            other => return Err(format!("is {other}, but an image or the path of one is wanted")),
        };
        open(&path).and_then(|file| check(file, path.display())).map_err(bad)?;
        self.all.push(Picture { source: Source::File(path), place: place.clone() });
        Ok(())
    }

    /// What it has grown by, for [`Room::settle`].
    pub fn store(&mut self) -> &mut Store {
        &mut self.kept
    }

    pub fn finish(self, room: &Room) -> crate::Result<Pictures> {
        Ok(Pictures { transform: self.transform, all: self.all, kept: self.kept.finish(room)? })
    }
}

/// A column of images.
#[derive(Debug)]
pub(super) struct Pictures {
    transform: Transform,
    all: Vec<Picture>,
    /// The bytes of those that came without a file of their own.
    kept: Stored,
}

impl Pictures {
    fn decode(&self, picture: &Picture) -> Result<DynamicImage, String> {
        match &picture.source {
            Source::File(path) => decode(open(path)?, picture),
            Source::Kept(range) => decode(Cursor::new(self.kept.read(range.clone())?), picture),
        }
    }

    pub fn len(&self) -> usize {
        self.all.len()
    }

    pub fn data_type(&self) -> DataType {
        self.transform.data_type
    }

    pub fn row_dims(&self) -> Vec<usize> {
        self.transform.dims().to_vec()
    }

    /// Decodes the images of some rows, on all cores.
    pub fn gather(&self, rows: &[usize]) -> Result<Tensor, String> {
        let pictures: Vec<&Picture> =
            rows.iter().map(|at| self.all.get(*at)).collect::<Option<_>>().ok_or("a row is missing")?;
        let transform = &self.transform;
        let row: usize = transform.dims().iter().product();
        let mut values = vec![0f32; row.checked_mul(rows.len()).ok_or("the batch is too large")?];
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let share = rows.len().div_ceil(cores).max(1);
        std::thread::scope(|scope| {
            let parts = pictures.chunks(share).zip(values.chunks_mut((share * row).max(1)));
            let workers: Vec<_> = parts
                .map(|(pictures, out)| {
                    scope.spawn(move || {
                        pictures.iter().zip(out.chunks_mut(row.max(1))).try_for_each(|(picture, out)| {
                            transform.write(&transform.pixels(self.decode(picture)?), out);
                            Ok::<(), String>(())
                        })
                    })
                })
                .collect();
            workers.into_iter().try_for_each(|w| w.join().map_err(|_| "an image could not be decoded".to_string())?)
        })?;
        let dims: Vec<usize> = std::iter::once(rows.len()).chain(transform.dims()).collect();
        Ok(match transform.data_type {
            DataType::Uint8 => Tensor::new(&dims, values.into_iter().map(|v| v as u8).collect::<Vec<u8>>()),
            DataType::Double => Tensor::new(&dims, values.into_iter().map(f64::from).collect::<Vec<f64>>()),
            DataType::Float16 => {
                Tensor::new(&dims, values.into_iter().map(half::f16::from_f32).collect::<Vec<half::f16>>())
            }
            DataType::Bfloat16 => {
                Tensor::new(&dims, values.into_iter().map(half::bf16::from_f32).collect::<Vec<half::bf16>>())
            }
            _ => Tensor::new(&dims, values),
        })
    }
}
