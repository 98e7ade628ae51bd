//! unload
