//! Lifts a model to a newer operator set in memory (for training; never in a merged file).
