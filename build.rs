//! Compiles the vendored official schema (`proto/onnx-ml.proto`, Apache-2.0, from the PyPI wheel `onnx` 1.23.2)
//! to Rust with protox and prost-build: pure Rust, no protoc on the machine.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto/onnx-ml.proto");
    let descriptors = protox::compile(["onnx-ml.proto"], ["proto"])?;
    prost_build::Config::new()
        // Weights stay slices of the memory map that the file was read from.
        .bytes([".onnx.TensorProto.raw_data"])
        .compile_fds(descriptors)?;
    Ok(())
}
