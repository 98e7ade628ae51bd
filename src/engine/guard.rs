//! A fence around other people's engines: some models make them panic, and a model must never take the program down.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::panic::{self, AssertUnwindSafe};
use std::sync::Once;

thread_local! {
    static GUARDED: Cell<bool> = const { Cell::new(false) };
    static PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Runs `work`; a panic in it becomes its message (with its place), unprinted. What `work` changes must not be used
/// again after a panic unless it is whole by design.
pub(super) fn guarded<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let others = panic::take_hook();
        panic::set_hook(Box::new(
            move |info| {
                if GUARDED.get() { PANIC.set(Some(info.to_string())) } else { others(info) }
            },
        ));
    });
    let outer = GUARDED.replace(true);
    let outcome = panic::catch_unwind(AssertUnwindSafe(work));
    GUARDED.set(outer);
    outcome
        .map_err(|payload| format!("it stumbled over this model: {}", PANIC.take().unwrap_or_else(|| words(&*payload))))
}

/// What a panic was raised with, for one that passed our hook by.
fn words(payload: &dyn Any) -> String {
    let text = payload.downcast_ref::<&str>().map(|s| s.to_string());
    text.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_else(|| "a panic without words".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_its_message() {
        assert_eq!(guarded(|| 7), Ok(7));
        let told = guarded(|| -> i32 { panic!("no {}", "luck") }).unwrap_err();
        assert!(told.contains("no luck") && told.contains("guard.rs"), "{told}");
        // Panics elsewhere are the caller's again.
        assert!(!GUARDED.get());
        assert_eq!(guarded(|| guarded(|| panic!("inner")).map_err(|e: String| e.len()).is_err()), Ok(true));
    }
}
