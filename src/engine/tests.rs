//! Both engines on small models built in code, and on an encoder whose outputs PyTorch computed.

use super::*;

#[test]
fn tiny() {
    let engine = open(EngineKind::OnnxRuntime, Device::Cpu).unwrap();
    let mut s = engine.load(&doctor::tiny_model(), &LoadOptions { threads: None, optimize: true }).unwrap();
    let x = Tensor::new(&[1, 3], vec![1f32, 2., 3.]);
    let w = Tensor::new(&[3, 2], vec![1f32, 2., 3., 4., 5., 6.]);
    let y = s.run(&[("x", &x), ("w", &w)], &["y"]).unwrap();
    println!("{} {:?}", engine.describe(), y);
    assert!((y[0].to_f64()[0] - 1.0 / (1.0 + 6f64.exp())).abs() < 1e-6);
}
