//! Fourier transforms at lengths that are and are not powers of two, and operators on indices that came with newer sets.

use super::*;

pub fn add(c: &mut Vec<Case>) {
    let length = |n: i64| Arg::Const(Tensor::scalar(n));
    for n in [8, 6, 5] {
        for (parts, inverse, onesided) in [(1, 0, 0), (1, 0, 1), (2, 0, 0), (2, 1, 0)] {
            let dft = |args| case("DFT", args).int("inverse", inverse).int("onesided", onesided).single();
            c.push(dft(vec![by(&[2, n, 3, parts])]).int("axis", 1).opsets(&[17]));
            c.push(dft(vec![by(&[2, n, 3, parts]), length(7)]).int("axis", 2).opsets(&[17]).what("filled"));
            c.push(dft(vec![by(&[2, n, parts]), length(4)]).opsets(&[17]).what("cut"));
            c.push(dft(vec![by(&[2, n, parts])]).opsets(&[20]));
            c.push(dft(vec![by(&[n, 3, parts]), Arg::Missing, length(-3)]).opsets(&[20]).what("axis"));
            let at_run_time = vec![by(&[n, 3, parts]), Arg::Missing, Arg::Given(Tensor::scalar(0i64))];
            c.push(dft(at_run_time).opsets(&[20]).what("axis at run time"));
        }
        let real = || case("DFT", vec![by(&[2, n / 2 + 1, 2]), length(n as i64)]).int("inverse", 1).int("onesided", 1);
        c.push(real().single().opsets(&[20]).what("to real numbers"));
    }
    let step = || Arg::Const(Tensor::scalar(2i64));
    for (window, onesided) in [(4, 1), (6, 0), (5, 1)] {
        let stft = |args| case("STFT", args).int("onesided", onesided).single().opsets(&[17, 20]);
        c.push(stft(vec![by(&[2, 13, 1]), step(), by(&[window])]).what("window"));
        c.push(stft(vec![by(&[2, 13, 1]), step(), Arg::Missing, length(window as i64)]).what("no window"));
    }

    for (mode, start) in [("linear", [1, 3]), ("circular", [4, 2])] {
        let args = || vec![by(&[2, 3, 5, 2]), by(&[2, 3, 2, 2]), given(&start)];
        c.push(case("TensorScatter", args()).string("mode", mode).opsets(&[24]).what(mode));
        let args = vec![by(&[2, 5, 3]), by(&[2, 2, 3]), given(&start)];
        c.push(case("TensorScatter", args).int("axis", 1).string("mode", mode).opsets(&[24]).what("axis"));
    }
    c.push(case("TensorScatter", vec![by(&[2, 5, 3]), by(&[2, 2, 3])]).opsets(&[24]).what("from the start"));
    for sorted in [0, 1] {
        c.push(case("Unique", vec![spaced(&[3, 4])]).int("sorted", sorted).what("flat"));
        c.push(case("Unique", vec![spaced(&[3, 4, 2])]).int("axis", -2).int("sorted", sorted).what("axis"));
    }
    c.push(case("CenterCropPad", vec![by(&[4, 5, 3]), given(&[7, 2, 3])]).single().opsets(&[18, 21]));
    let axes = case("CenterCropPad", vec![by(&[4, 5, 3]), given(&[3, 8])]).ints("axes", &[-1, 0]);
    c.push(axes.single().opsets(&[18]).what("axes"));
    for (exclusive, reverse) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
        let product = |values| {
            let args = vec![Arg::By(vec![2, 5], values), Arg::Const(Tensor::scalar(1i64))];
            case("CumProd", args).int("exclusive", exclusive).int("reverse", reverse).opsets(&[26])
        };
        c.push(product(vec![0.5, -1.2, 0.8, 1.5, -0.7, 1.1, 0.9, -1.3, 0.6, 1.4]));
        c.push(product(vec![0.5, 0.0, 0.8, 1.5, -0.7, 0.0, 0.9, 0.0, 0.6, 1.4]).what("zeros"));
    }

    let grid = |dims: &[usize]| {
        let n = dims.iter().product::<usize>() as i32;
        Arg::Given(Tensor::new(dims, (0..n).map(|i| (i * 37 % 51) as i8 - 25).collect()))
    };
    let zero = |dims: &[usize], values: &[i8]| Arg::Const(Tensor::new(dims, values.to_vec()));
    let dequantize = |args| case("DequantizeLinear", args).single();
    c.push(dequantize(vec![grid(&[3, 4]), by(&[]), zero(&[], &[3])]));
    c.push(dequantize(vec![grid(&[2, 3, 4]), by(&[3]), zero(&[3], &[1, -2, 5])]).what("by axis"));
    c.push(dequantize(vec![grid(&[2, 4]), by(&[2])]).int("axis", 0).what("by the first axis"));
    let blocks = dequantize(vec![grid(&[2, 6, 3]), by(&[2, 2, 3])]).int("axis", 1).int("block_size", 3);
    c.push(blocks.opsets(&[21]).what("by blocks"));
    c.push(dequantize(vec![grid(&[3, 4]), by(&[]), zero(&[], &[3])]).domain(MS));
}
