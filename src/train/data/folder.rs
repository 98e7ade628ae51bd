//! Folders of images, a folder per class: `root/class_name/picture.png`, as torchvision's and `datasets`' ImageFolder.

use std::fs;
use std::path::{Path, PathBuf};

use super::record::{At, Cell, Place, Record, RecordFormat, Records, Schema, Wanted};
use crate::{Error, Result};

pub(super) const FORMAT: RecordFormat = RecordFormat { schema, open };

const IMAGES: [&str; 3] = ["png", "jpg", "jpeg"];
/// Images that are left to other tools.
const OTHERS: [&str; 7] = ["bmp", "gif", "pgm", "ppm", "tif", "tiff", "webp"];

/// True where `path` holds folders that hold images.
pub(super) fn is_one(path: &Path) -> bool {
    let entries = |path: &Path| fs::read_dir(path).into_iter().flatten().flatten().map(|e| e.path());
    entries(path).filter(|p| p.is_dir()).any(|class| entries(&class).any(|p| p.is_dir() || has(&p, &IMAGES)))
}

fn has(path: &Path, extensions: &[&str]) -> bool {
    path.extension().is_some_and(|e| extensions.iter().any(|known| e.eq_ignore_ascii_case(known)))
}

fn schema(_: &Path) -> Result<Schema> {
    let columns = vec!["image".into(), "label".into()];
    Ok(Schema { columns, images: vec!["image".into()], ..Default::default() })
}

/// The images below `root` with the names of their classes: classes, folders and files in the order of their names.
pub(super) fn images(root: &Path) -> Result<Vec<(PathBuf, String)>> {
    let mut found = Vec::new();
    for class in sorted(root)?.into_iter().filter(|p| p.is_dir()) {
        let name = class.file_name().and_then(|n| n.to_str()).map(str::to_string);
        let name = name.ok_or_else(|| Error::file(&class, "the folder's name is not UTF-8, and it names a class"))?;
        let before = found.len();
        let mut folders = vec![class.clone()];
        let mut at = 0;
        while let Some(folder) = folders.get(at) {
            let below: Vec<PathBuf> = sorted(folder)?.into_iter().filter(|p| p.is_dir()).collect();
            folders.extend(below);
            at += 1;
        }
        folders.sort();
        for file in folders.iter().map(|f| sorted(f)).collect::<Result<Vec<_>>>()?.into_iter().flatten() {
            if has(&file, &OTHERS) {
                return Err(Error::file(&file, "images are read from .png and .jpg files; convert it"));
            }
            if has(&file, &IMAGES) && file.is_file() {
                found.push((file, name.clone()));
            }
        }
        if found.len() == before {
            return Err(Error::file(&class, "a folder of images is a class, and this one holds no .png or .jpg"));
        }
    }
    Ok(found)
}

/// What stands in a folder, but for hidden files.
fn sorted(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder).map_err(Error::io("read", folder))? {
        let entry = entry.map_err(Error::io("read", folder))?;
        if !entry.file_name().to_string_lossy().starts_with('.') {
            paths.push(entry.path());
        }
    }
    paths.sort();
    Ok(paths)
}

fn open(root: &Path, wanted: &[Wanted]) -> Result<Records> {
    let columns = schema(root)?.columns;
    let picked = wanted.iter().map(|w| w.position(root, &columns)).collect::<Result<Vec<_>>>()?;
    Ok(Box::new(images(root)?.into_iter().map(move |(path, class)| {
        let place = Place { path: path.as_path().into(), at: At::Whole };
        let cell = |at: &usize| if *at == 0 { Cell::File(path.clone()) } else { Cell::Text(class.clone()) };
        Ok(Record { place, cells: picked.iter().map(cell).collect() })
    })))
}
