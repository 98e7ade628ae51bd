//! Choices out of a fixed set of words: how flags, files and messages spell them, in one table per type.

use crate::did_you_mean;

/// Gives an enum its words: `FromStr` (in any case; every word of a variant counts), `Display` and `word` (the first
/// one), `WORDS` (all of them).
macro_rules! words {
    ($name:ident, $what:literal { $($variant:ident = $first:literal $(| $more:literal)*),+ $(,)? }) => {
        impl $name {
            /// The words that stand for it, the first of each variant being the one that is written.
            pub const WORDS: &[&str] = &[$($first $(, $more)*),+];

            /// The word that is written for it.
            pub fn word(self) -> &'static str {
                match self { $(Self::$variant => $first),+ }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.word())
            }
        }

        impl std::str::FromStr for $name {
            type Err = String;

            fn from_str(text: &str) -> std::result::Result<Self, String> {
                $(if [$first $(, $more)*].iter().any(|word| text.eq_ignore_ascii_case(word)) {
                    return Ok(Self::$variant);
                })+
                Err($crate::words::unknown($what, text, &[$($first $(, $more)*),+]))
            }
        }
    };
}
pub(crate) use words;

/// What is said of a word that is none of `words`.
pub(crate) fn unknown(what: &str, text: &str, words: &[&str]) -> String {
    let near = did_you_mean(text, words.iter().copied());
    let stop = if near.is_empty() { "" } else { "." };
    format!("{what} is {text:?}; allowed are {}{stop}{near}", words.join(", "))
}
