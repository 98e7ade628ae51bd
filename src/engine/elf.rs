//! What a shared library says of itself, read from its file without loading it: the libraries it needs, and the version
//! of ONNX Runtime that is written in it. For 64-bit little-endian ELF; of other files nothing is known.

use std::ops::Range;

/// The sections of an ELF file that are looked at here.
pub(super) struct Elf<'a> {
    bytes: &'a [u8],
    dynamic: &'a [u8],
    strings: &'a [u8],
    constants: &'a [u8],
}

/// Tag of an entry of `.dynamic` that names a needed library.
const NEEDED: u64 = 1;

impl<'a> Elf<'a> {
    /// `None` for what is no such file.
    pub fn parse(bytes: &'a [u8]) -> Option<Self> {
        if !bytes.starts_with(b"\x7fELF\x02\x01") {
            return None;
        }
        let (table, size) = (number(bytes, 0x28, 8)?, number(bytes, 0x3a, 2)?);
        let (count, names) = (number(bytes, 0x3c, 2)?, number(bytes, 0x3e, 2)?);
        let header = |i: u64| -> Option<&[u8]> {
            let start = usize::try_from(table.checked_add(i.checked_mul(size)?)?).ok()?;
            bytes.get(start..start.checked_add(64)?)
        };
        let content = |header: &[u8]| -> Option<&'a [u8]> {
            let (start, len) = (number(header, 0x18, 8)?, number(header, 0x20, 8)?);
            let range: Range<usize> = start.try_into().ok()?..start.checked_add(len)?.try_into().ok()?;
            bytes.get(range)
        };
        let names = content(header(names)?)?;
        let section = |wanted: &str| {
            let mut headers = (0..count).filter_map(header);
            headers.find(|h| number(h, 0, 4).and_then(|at| text(names, at)) == Some(wanted)).and_then(content)
        };
        let (dynamic, strings) = (section(".dynamic")?, section(".dynstr")?);
        Some(Self { bytes, dynamic, strings, constants: section(".rodata").unwrap_or_default() })
    }

    /// Names of the libraries that have to be there for this one to be loaded.
    pub fn needed(&self) -> Vec<&'a str> {
        let entries = self.dynamic.chunks_exact(16);
        let needed = entries.filter(|e| number(e, 0, 8) == Some(NEEDED));
        needed.filter_map(|e| text(self.strings, number(e, 8, 8)?)).collect()
    }

    /// Constants that are versions of ONNX Runtime (`1.31.1`).
    pub fn versions(&self) -> Vec<&'a str> {
        let constants = if self.constants.is_empty() { self.bytes } else { self.constants };
        let is_version = |part: &&[u8]| {
            part.starts_with(b"1.")
                && part.len() <= 10
                && part.split(|b| *b == b'.').count() == 3
                && part.split(|b| *b == b'.').all(|n| !n.is_empty() && n.iter().all(u8::is_ascii_digit))
        };
        constants.split(|b| *b == 0).filter(is_version).filter_map(|v| std::str::from_utf8(v).ok()).collect()
    }
}

/// The little-endian number of `size` bytes at `at`.
fn number(bytes: &[u8], at: usize, size: usize) -> Option<u64> {
    let bytes = bytes.get(at..at.checked_add(size)?)?;
    Some(bytes.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b)))
}

/// The text that begins at `at` and ends before a zero.
fn text(bytes: &[u8], at: u64) -> Option<&str> {
    let bytes = bytes.get(usize::try_from(at).ok()?..)?;
    let end = bytes.iter().position(|b| *b == 0)?;
    std::str::from_utf8(&bytes[..end]).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{Device, Places, discover};
    use crate::onnx::external::map_file;

    #[cfg(target_os = "linux")]
    #[test]
    fn onnxruntime_says_what_it_needs_and_which_it_is() {
        let library = discover::pick(&Places::from_env(), Device::Cpu).unwrap().expect("libonnxruntime");
        let bytes = map_file(&library.path).unwrap();
        let elf = Elf::parse(&bytes).unwrap();
        let needed = elf.needed();
        assert!(needed.contains(&"libc.so.6") && needed.contains(&"libstdc++.so.6"), "{needed:?}");
        assert!(elf.versions().contains(&library.version.unwrap().as_str()), "{:?}", elf.versions());
        // Cut off anywhere, it is nothing or less, but no panic.
        for len in [0, 5, 63, 64, 100, 4096, bytes.len() / 2, bytes.len() - 1] {
            Elf::parse(&bytes[..len]).map(|elf| (elf.needed(), elf.versions().len()));
        }
        let mut broken = bytes.to_vec();
        broken[0x28..0x40].fill(0xff);
        assert!(Elf::parse(&broken).is_none());
    }
}
