//! Writing a model whose tensors may stand in files beside it. New data goes to files of new names; the model file, when
//! it is renamed into place, takes them over; only then do the files go that nothing names any longer. So whenever the
//! writing ends, the model under the final name is the old one or the new one, with data of its own.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{self, Permissions};
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::Serialize;
use sha1::{Digest, Sha1};

use super::external::{Place, is_external, place};
use super::safetensors::{self, Entry};
use super::{
    Due, Durability, Model, Moved, NewPlace, NewTensor, Origin, Patch, Rope, Scope, TensorProto, beside, walk_graphs,
};
use crate::{Error, Result};

/// Where a written model keeps its tensors.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Layout {
    /// Where the source has them: in the model, or at the same place of a file like the source's. Files in which nothing
    /// changes stay what they are, where the new model finds them.
    #[default]
    AsRead,
    /// All in the model.
    Inline,
    /// In a file beside the model, but for small ones: from `shard` bytes on in another one, and so on.
    File { name: String, shard: Option<u64> },
}

/// How to write.
#[derive(Debug, Clone, Default)]
pub struct Store {
    pub layout: Layout,
    pub durability: Durability,
}

/// A tensor's place in the source's graphs.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Slot {
    Initializer { scope: Scope, index: usize },
    Attribute { scope: Scope, node: usize, attribute: usize },
}

/// Values that a rewrite makes, wherever they are to stand.
#[derive(Default)]
pub struct NewValues {
    /// New values of the source's tensors; name, type and shape stay.
    pub replaced: BTreeMap<Slot, Due>,
    /// New initializers of the main graph: without a value, the value, and whether it stands in a file.
    pub added: Vec<(TensorProto, Due, bool)>,
}

/// What was written beside the model.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Stored {
    /// Data files that were written.
    pub written: Vec<PathBuf>,
    /// Data files of the replaced model that were removed.
    pub removed: Vec<PathBuf>,
    /// Those that stay, because another model uses them (or may).
    pub kept: Vec<PathBuf>,
    /// A file of another kind than the source's, and why.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

/// External tensors of the written model start at multiples of this (ONNX `docs/ExternalData.md`).
const ALIGNMENT: usize = 4096;

/// Tensors from this size on go to a data file.
const WORTH_A_FILE: usize = 1024;

impl Store {
    /// Writes the model that results from `patch` and `values` to `out`, which may be the source's own path.
    ///
    /// # Errors
    /// A data file that is not what its checksum says; names that are taken or lead out of the directory; a model too
    /// large for one file; those of making the values and of the file system. Nothing is left behind then.
    pub fn write(&self, model: &Model, patch: Patch, values: NewValues, out: &Path) -> Result<Stored> {
        let mut work = Work { model, out, patch, files: Vec::new(), taken: HashSet::new(), note: None };
        match &self.layout {
            Layout::AsRead => work.as_read(values)?,
            Layout::Inline => work.inline(values)?,
            Layout::File { name, shard } => work.joined(values, name, *shard)?,
        }
        let Work { mut patch, files, note, .. } = work;
        // Until the model takes them over, new files are nobody's.
        let mut new = Undo(Vec::new());
        for DataFile { path, rope, origins, mode, checked, location, moves, tensors } in files {
            super::atomic::create(&path, rope, &origins, mode, self.durability)?;
            new.0.push(path.clone());
            let map = || Origin::open(&path).map_err(Error::io("read", &path));
            let checksum = if checked { Some(sha1(&map()?.bytes)) } else { None };
            for old in moves {
                patch.moved.insert(old, Moved { location: location.clone(), checksum: checksum.clone() });
            }
            for (to, range) in tensors {
                let (offset, length) = (range.start as u64, Some(range.len() as u64));
                let place = Place { location: location.clone(), offset, length, checksum: checksum.clone() };
                match to {
                    To::Slot(slot) => put(&mut patch, slot, NewPlace::External(place)),
                    To::New(header) => {
                        let TensorProto { external_data, data_location, .. } = place.entries();
                        add(&mut patch, TensorProto { external_data, data_location, ..*header }, None);
                    }
                }
            }
        }
        let before = beside::files_of(out).unwrap_or_default();
        model.write_as(model.patched(patch)?, out, self.durability)?;
        let mut stored = Stored { written: std::mem::take(&mut new.0), note, ..Default::default() };
        let Ok(after) = beside::files_of(out) else { return Ok(stored) };
        for (named, real) in before {
            if !after.iter().any(|(_, used)| *used == real) {
                let goes = !named.is_symlink() && !beside::is_used_by_others(&real, out);
                let gone = goes && fs::remove_file(&named).is_ok();
                if gone { &mut stored.removed } else { &mut stored.kept }.push(named);
            }
        }
        Ok(stored)
    }
}

/// Removes files on the way out.
struct Undo(Vec<PathBuf>);

impl Drop for Undo {
    fn drop(&mut self) {
        self.0.iter().for_each(|path| drop(fs::remove_file(path)));
    }
}

/// A tensor of the written model: one that was there, or a new one.
enum To {
    Slot(Slot),
    New(Box<TensorProto>),
}

/// Tensors, and the bytes of a file that they are.
type Tensors = Vec<(To, Range<usize>)>;

/// A data file to write.
struct DataFile {
    location: String,
    path: PathBuf,
    rope: Rope,
    origins: Vec<Origin>,
    /// That of the file it takes the place of.
    mode: Option<Permissions>,
    /// Whether the model is to say its checksum.
    checked: bool,
    /// Locations in the source whose tensors all stand here now, at the same places.
    moves: Vec<String>,
    /// Other tensors that stand here.
    tensors: Tensors,
}

struct Work<'a> {
    model: &'a Model,
    out: &'a Path,
    patch: Patch,
    files: Vec<DataFile>,
    /// Paths that files of `files` are to have.
    taken: HashSet<PathBuf>,
    note: Option<String>,
}

impl Work<'_> {
    /// Every tensor stays where the source has it.
    fn as_read(&mut self, values: NewValues) -> Result<()> {
        let mut sources = sources(self.model)?;
        let mut extra = Joined::new(None, ALIGNMENT);
        let tensors: HashMap<Slot, &TensorProto> = self.model.slots().into_iter().collect();
        for (slot, due) in values.replaced {
            let tensor = tensors.get(&slot).ok_or_else(|| Error::model("a tensor to be changed is not there"))?;
            if !is_external(tensor) {
                put(&mut self.patch, slot, NewPlace::Inline(due.into()));
                continue;
            }
            let place = place(tensor)?;
            let file = sources.iter_mut().find(|s| s.locations.contains(&place.location));
            let file = file.ok_or_else(|| Error::model("a data file to be changed is not there"))?;
            match place.range(file.origin.bytes.len()).filter(|r| r.len() == due.len && file.is_alone(r)) {
                Some(range) => drop(file.changes.insert(range.start, due)),
                // Others read these bytes as well.
                None => extra.push(To::Slot(slot), tensor, due.into()),
            }
        }
        for (header, due, external) in values.added {
            match external {
                true => extra.push(To::New(header.clone().into()), &header, due.into()),
                false => add(&mut self.patch, header, Some(due)),
            }
        }
        let checked = sources.iter().any(|s| s.checksum.is_some());
        let only = sources.len() == 1;
        let fixed = sources.iter().flat_map(|s| &s.locations).find(|l| is_safetensors(l)).cloned();
        sources.into_iter().try_for_each(|source| self.source_file(source, only))?;
        if extra.files.is_empty() {
            return Ok(());
        }
        // The first name wanted is a source's; here there is none.
        let names = beside::names("", self.out, true).skip(1);
        let named = beside::free(beside::directory(self.out), names, &mut self.taken)?;
        self.note = fixed.map(|fixed| {
            let count = extra.files.iter().map(|(_, tensors)| tensors.len()).sum::<usize>();
            format!(
                "{count} new tensors are in {}: {fixed} has no place for others than its own; \
                 --external-data-location NAME.safetensors writes all into a new file of that kind",
                named.0
            )
        });
        self.lay(extra, vec![named], checked)
    }

    /// The new model's form of a data file of the source: itself, a copy, or one with other values in it.
    fn source_file(&mut self, source: SourceFile, only: bool) -> Result<()> {
        let dir = beside::directory(self.out);
        let changes = !source.changes.is_empty();
        if !changes && source.locations.iter().all(|l| beside::is_at(dir, l, &source.origin, Some(&source.real))) {
            return Ok(());
        }
        if changes {
            source.verify()?;
        }
        let names = beside::names(&source.locations[0], self.out, only);
        let (location, path) = beside::free(dir, names, &mut self.taken)?;
        let real = |path: &Path| fs::canonicalize(path).ok();
        let in_place = real(self.out).is_some_and(|out| real(&self.model.path) == Some(out));
        let mode = source.origin.file.metadata().ok().filter(|_| in_place).map(|m| m.permissions());
        let bytes = &source.origin.bytes;
        let (mut rope, mut at) = (Rope::default(), 0);
        for (start, due) in source.changes {
            rope.push(bytes.slice(at..start));
            at = start + due.len;
            rope.push_due(due);
        }
        rope.push(bytes.slice(at..));
        let (checked, moves, origins) = (changes && source.checksum.is_some(), source.locations, vec![source.origin]);
        self.files.push(DataFile { location, path, rope, origins, mode, checked, moves, tensors: Vec::new() });
        Ok(())
    }

    /// Every tensor comes into the model.
    fn inline(&mut self, mut values: NewValues) -> Result<()> {
        for (slot, tensor) in self.model.slots() {
            let value = match values.replaced.remove(&slot) {
                _ if slot.is_dropped_by(&self.patch) => None,
                Some(due) => Some(due.into()),
                None if is_external(tensor) => Some(self.model.tensor_bytes(tensor)?.into()),
                None => None,
            };
            if let Some(value) = value {
                put(&mut self.patch, slot, NewPlace::Inline(value));
            }
        }
        values.added.into_iter().for_each(|(header, value, _)| add(&mut self.patch, header, Some(value)));
        Ok(())
    }

    /// Every tensor that is not small goes to files of one name.
    fn joined(&mut self, mut values: NewValues, name: &str, shard: Option<u64>) -> Result<()> {
        // Its tensors follow one another without a gap, those of large elements first, so that all are aligned.
        let packed = is_safetensors(name);
        let shard = shard.map(|n| usize::try_from(n).unwrap_or(usize::MAX));
        let mut joined = Joined::new(shard, if packed { 1 } else { ALIGNMENT });
        let mut slots = self.model.slots();
        if packed {
            slots.sort_by_key(|(_, tensor)| std::cmp::Reverse(safetensors::element_size(tensor.data_type())));
            values.added.sort_by_key(|(header, ..)| std::cmp::Reverse(safetensors::element_size(header.data_type())));
        }
        for (slot, tensor) in slots {
            let external = is_external(tensor);
            let stays = !external && (tensor.raw_data.is_none() || matches!(slot, Slot::Attribute { .. }));
            let value: Rope = match values.replaced.remove(&slot) {
                _ if slot.is_dropped_by(&self.patch) => continue,
                Some(due) if stays => {
                    put(&mut self.patch, slot, NewPlace::Inline(due.into()));
                    continue;
                }
                Some(due) => due.into(),
                None if stays => continue,
                None => self.model.tensor_bytes(tensor)?.into(),
            };
            if value.len() >= WORTH_A_FILE {
                joined.push(To::Slot(slot), tensor, value);
            } else if external {
                put(&mut self.patch, slot, NewPlace::Inline(value));
            }
        }
        for (header, value, _) in values.added {
            joined.push(To::New(header.clone().into()), &header, value.into());
        }
        let checked = sources(self.model)?.iter().any(|s| s.checksum.is_some());
        let dir = beside::directory(self.out);
        let mut named = Vec::new();
        for index in 0..joined.files.len() {
            let location = shard_name(name, index, joined.files.len());
            let path = beside::landing(dir, &location)?;
            if path.exists() {
                return Err(Error::config(format!(
                    "{}: this file is there already; remove it or choose another --external-data-location",
                    path.display()
                )));
            }
            named.push((location, path));
        }
        self.lay(joined, named, checked)
    }

    /// Gives the files of `joined` their names.
    fn lay(&mut self, joined: Joined, named: Vec<(String, PathBuf)>, checked: bool) -> Result<()> {
        let mut origins: Vec<Origin> = sources(self.model)?.into_iter().map(|s| s.origin).collect();
        origins.extend(self.model.origin().cloned());
        for ((mut rope, mut tensors), (location, path)) in joined.files.into_iter().zip(named) {
            let origins = origins.clone();
            if is_safetensors(&location) {
                let entries: Vec<Entry> =
                    tensors.iter().map(|(_, range, tensor)| Entry::of(tensor, range.clone())).collect();
                let head = safetensors::head(&entries);
                tensors.iter_mut().for_each(|(_, range, _)| *range = range.start + head.len()..range.end + head.len());
                let mut whole = Rope::from(bytes::Bytes::from(head));
                whole.append(rope);
                rope = whole;
            }
            let tensors = tensors.into_iter().map(|(to, range, _)| (to, range)).collect();
            self.files.push(DataFile {
                location,
                path,
                rope,
                origins,
                mode: None,
                checked,
                moves: Vec::new(),
                tensors,
            });
        }
        Ok(())
    }
}

impl Slot {
    /// True for a tensor that `patch` takes out.
    pub fn is_dropped_by(&self, patch: &Patch) -> bool {
        let (Slot::Initializer { scope, .. } | Slot::Attribute { scope, .. }) = self;
        patch.graphs.get(scope).is_some_and(|graph| match self {
            Slot::Initializer { index, .. } => graph.drop_initializers.contains(index),
            Slot::Attribute { node, .. } => graph.drop_nodes.contains(node),
        })
    }
}

fn put(patch: &mut Patch, slot: Slot, place: NewPlace) {
    match slot {
        Slot::Initializer { scope, index } => patch.graph(&scope).replace_values.insert(index, place),
        Slot::Attribute { scope, node, attribute } => {
            patch.graph(&scope).replace_attributes.insert((node, attribute), place)
        }
    };
}

fn add(patch: &mut Patch, header: TensorProto, value: Option<Due>) {
    patch.graph(&Scope::new()).add_initializers.push(NewTensor { header, value });
}

/// A value in such a file: where it goes, its bytes there, and name, type and shape of the tensor.
type Value = (To, Range<usize>, TensorProto);

/// Values one after another, in files that have room for `shard` bytes each (for one value in any case).
struct Joined {
    shard: Option<usize>,
    alignment: usize,
    /// Each with what stands in it.
    files: Vec<(Rope, Vec<Value>)>,
}

impl Joined {
    fn new(shard: Option<usize>, alignment: usize) -> Self {
        Self { shard, alignment, files: Vec::new() }
    }

    /// Adds the value of `tensor`, whose own value is not looked at.
    fn push(&mut self, to: To, tensor: &TensorProto, value: Rope) {
        let aligned = |offset: usize| offset.next_multiple_of(self.alignment);
        let full = |rope: &Rope| self.shard.is_some_and(|shard| aligned(rope.len()) + value.len() > shard);
        if self.files.last().is_none_or(|(rope, _)| full(rope)) {
            self.files.push((Rope::default(), Vec::new()));
        }
        if let Some((rope, tensors)) = self.files.last_mut() {
            rope.push(vec![0; aligned(rope.len()) - rope.len()]);
            let (name, dims, data_type) = (tensor.name.clone(), tensor.dims.clone(), tensor.data_type);
            let header = TensorProto { name, dims, data_type, ..Default::default() };
            tensors.push((to, rope.len()..rope.len() + value.len(), header));
            rope.append(value);
        }
    }
}

fn is_safetensors(name: &str) -> bool {
    name.ends_with(".safetensors")
}

/// `name` for an only file, else `<stem>-00001-of-00003.<ending>` and so on, as others name shards.
fn shard_name(name: &str, index: usize, count: usize) -> String {
    if count == 1 {
        return name.into();
    }
    let (stem, ending) =
        name.rfind('.').filter(|at| !name[*at..].contains('/')).map_or((name, ""), |at| name.split_at(at));
    format!("{stem}-{:05}-of-{count:05}{ending}", index + 1)
}

/// A data file of the source.
struct SourceFile {
    real: PathBuf,
    origin: Origin,
    /// What the tensors call it.
    locations: Vec<String>,
    checksum: Option<String>,
    /// What of it the tensors are.
    ranges: Vec<Range<usize>>,
    /// New values, by where they start.
    changes: BTreeMap<usize, Due>,
}

impl SourceFile {
    /// True where no other tensor has bytes of `range`, which is one tensor's.
    fn is_alone(&self, range: &Range<usize>) -> bool {
        // `ranges` is in order of the starts; nothing that starts before has to end before.
        let meets = |other: &&Range<usize>| other.start < range.end && range.start < other.end;
        self.ranges.iter().filter(meets).take(2).count() == 1
    }

    /// Compares the file with the checksum that the model says of it.
    fn verify(&self) -> Result<()> {
        let Some(said) = &self.checksum else { return Ok(()) };
        let found = sha1(&self.origin.bytes);
        if found.eq_ignore_ascii_case(said.trim()) {
            return Ok(());
        }
        Err(Error::file(
            &self.real,
            format!(
                "its SHA-1 is {found}, but the model says {said}: the file was changed or damaged; copy it again from \
                 where the model came from"
            ),
        ))
    }
}

/// The data files of `model`, in the order in which tensors name them.
fn sources(model: &Model) -> Result<Vec<SourceFile>> {
    let mut files: Vec<SourceFile> = Vec::new();
    let mut at: HashMap<String, usize> = HashMap::new();
    for tensor in model.slots().into_iter().map(|(_, tensor)| tensor).filter(|t| is_external(t)) {
        let place = place(tensor)?;
        let index = match at.get(&place.location) {
            Some(index) => *index,
            None => {
                let failed =
                    |what| Error::file(&model.path, format!("its external data is at {:?}, {what}", place.location));
                let real = model.external.resolve(&place.location).map_err(failed)?;
                let index = files.iter().position(|f| f.real == real).unwrap_or(files.len());
                if index == files.len() {
                    let origin = model.external.file(&place.location).map_err(failed)?;
                    let (locations, ranges, changes) = (Vec::new(), Vec::new(), BTreeMap::new());
                    files.push(SourceFile { real, origin, locations, checksum: None, ranges, changes });
                }
                files[index].locations.push(place.location.clone());
                at.insert(place.location.clone(), index);
                index
            }
        };
        let file = &mut files[index];
        file.checksum = file.checksum.take().or(place.checksum.clone());
        file.ranges.extend(place.range(file.origin.bytes.len()).filter(|r| !r.is_empty()));
    }
    Ok(files)
}

impl Model {
    /// Reads the data files in full: is every tensor's range in them, and are they what the checksums say, where the model
    /// says any? Returns how many files there are.
    ///
    /// # Errors
    /// The first file that is too short or is another.
    pub fn check_data(&self) -> Result<usize> {
        for (_, tensor) in self.slots().into_iter().filter(|(_, t)| is_external(t)) {
            self.tensor_bytes(tensor)?;
        }
        let sources = sources(self)?;
        sources.iter().try_for_each(SourceFile::verify)?;
        Ok(sources.len())
    }

    /// All tensors that are initializers or attributes, in file order.
    pub fn slots(&self) -> Vec<(Slot, &TensorProto)> {
        let mut slots = Vec::new();
        walk_graphs(self.graph(), &mut |scope, graph| {
            for (index, tensor) in graph.initializer.iter().enumerate() {
                slots.push((Slot::Initializer { scope: scope.clone(), index }, tensor));
            }
            for (node, proto) in graph.node.iter().enumerate() {
                let tensors = proto.attribute.iter().enumerate().filter_map(|(i, a)| Some((i, a.t.as_ref()?)));
                for (attribute, tensor) in tensors {
                    slots.push((Slot::Attribute { scope: scope.clone(), node, attribute }, tensor));
                }
            }
        });
        slots
    }
}

/// SHA-1 in hexadecimal.
pub(crate) fn sha1(bytes: &[u8]) -> String {
    Sha1::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}
