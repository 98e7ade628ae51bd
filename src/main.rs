//! The `bone-onnx` binary. Everything it does is in the library.

fn main() -> std::process::ExitCode {
    bone_onnx::cli::main()
}
