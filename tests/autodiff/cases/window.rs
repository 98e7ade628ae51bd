//! Convolutions and pools: ranks, strides, dilations, pads and what they leave over.

use super::*;

pub fn add(c: &mut Vec<Case>) {
    let conv = |x: &[usize], w: &[usize]| case("Conv", vec![by(x), by(w), by(&w[..1])]).single();
    c.push(conv(&[2, 4, 5, 5], &[6, 2, 3, 3]).int("group", 2).ints("pads", &[1, 1, 1, 1]).what("groups, weight"));
    c.push(conv(&[2, 3, 7], &[3, 1, 3]).int("group", 3).ints("strides", &[2]).what("depthwise"));
    c.push(conv(&[1, 2, 4, 5, 3], &[3, 2, 2, 2, 2]).ints("strides", &[2, 1, 1]).what("3-D"));
    for auto in ["SAME_UPPER", "SAME_LOWER", "VALID"] {
        c.push(conv(&[2, 2, 6, 7], &[3, 2, 3, 2]).ints("strides", &[2, 1]).string("auto_pad", auto).what("auto_pad"));
    }
    let back = |x: &[usize], w: &[usize], m| case("ConvTranspose", vec![by(x), by(w), by(&[m])]).single();
    c.push(back(&[2, 3, 4, 3], &[3, 2, 3, 2], 2).ints("strides", &[2, 2]).ints("pads", &[1, 0, 0, 1]).what("pads"));
    c.push(back(&[1, 4, 5], &[4, 3, 3], 6).int("group", 2).ints("dilations", &[2]).what("groups, dilated"));
    c.push(back(&[1, 2, 3, 3], &[2, 1, 3, 3], 1).ints("strides", &[2, 3]).ints("output_padding", &[1, 2]).what("more"));
    c.push(back(&[1, 2, 3, 3], &[2, 1, 3, 3], 1).ints("strides", &[3, 2]).ints("output_shape", &[10, 8]).what("shape"));
    for auto in ["SAME_UPPER", "SAME_LOWER"] {
        let case = back(&[1, 2, 3, 4], &[2, 2, 3, 4], 2).ints("strides", &[2, 2]);
        c.push(case.string("auto_pad", auto).what("auto_pad"));
    }
    c.push(back(&[1, 2, 2, 3, 2], &[2, 1, 2, 2, 2], 1).what("3-D"));

    for op in ["MaxPool", "AveragePool", "LpPool"] {
        let pool = |dims: &[usize], kernel: &[i64]| {
            let case = case(op, vec![spaced(dims)]).ints("kernel_shape", kernel);
            if op == "MaxPool" { case } else { case.single() }
        };
        c.push(pool(&[2, 2, 7], &[3]).ints("strides", &[2]).what("1-D"));
        c.push(pool(&[2, 2, 5, 6], &[2, 3]).what("plain"));
        c.push(pool(&[1, 2, 5, 6], &[3, 3]).ints("pads", &[1, 0, 1, 2]).ints("strides", &[2, 2]).what("pads"));
        c.push(pool(&[1, 1, 3, 4, 4], &[2, 2, 2]).ints("strides", &[1, 2, 1]).what("3-D"));
        let ceil = pool(&[1, 2, 6, 5], &[3, 2]).ints("strides", &[2, 2]).int("ceil_mode", 1).opsets(&[18, 21]);
        c.push(ceil.what("rounded up"));
        let dilated = pool(&[1, 2, 7, 6], &[2, 3]).ints("dilations", &[3, 2]).ints("pads", &[1, 1, 1, 1]);
        c.push(if op == "MaxPool" { dilated } else { dilated.opsets(&[19, 21]) }.what("dilated"));
        for auto in ["SAME_UPPER", "SAME_LOWER", "VALID"] {
            let case = pool(&[1, 2, 6, 5], &[3, 2]).ints("strides", &[2, 2]);
            c.push(case.string("auto_pad", auto).what("auto_pad"));
        }
    }
    let average = |dims: &[usize]| {
        let case = case("AveragePool", vec![by(dims)]).ints("kernel_shape", &[3, 2]).ints("strides", &[2, 2]);
        case.int("count_include_pad", 1).ints("pads", &[1, 0, 1, 1]).single()
    };
    c.push(average(&[2, 1, 5, 5]).what("pads count"));
    c.push(average(&[2, 1, 6, 6]).int("ceil_mode", 1).opsets(&[19, 21]).what("pads count, rounded up"));
    c.push(case("LpPool", vec![spaced(&[1, 2, 6])]).ints("kernel_shape", &[2]).int("p", 3).single().what("p = 3"));
    c.push(case("LpPool", vec![spaced(&[1, 2, 6])]).ints("kernel_shape", &[2]).int("p", 1).single().what("p = 1"));
    let double = case("MaxPool", vec![spaced(&[1, 2, 5, 4])]).ints("kernel_shape", &[2, 2]);
    c.push(double.int("storage_order", 1).what("columns first"));
    for op in ["GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"] {
        c.push(case(op, vec![spaced(&[2, 3, 4, 5])]).single());
        c.push(case(op, vec![spaced(&[2, 3, 5])]).single().what("1-D"));
    }
    c.push(case("GlobalLpPool", vec![spaced(&[2, 3, 5])]).int("p", 3).single().what("p = 3"));
    let at = index(&[1, 1, 2, 2], &[5, 7, 13, 15]);
    let unpool = case("MaxUnpool", vec![by(&[1, 1, 2, 2]), Arg::Given(at)]).ints("kernel_shape", &[2, 2]);
    c.push(unpool.ints("strides", &[2, 2]).single());
    let columns = |dims, image, block| case("Col2Im", vec![by(dims), fixed(image), fixed(block)]).single();
    c.push(columns(&[2, 12, 9], &[4, 5], &[2, 3][..]).opsets(&[18, 21]));
    let strided = columns(&[1, 4, 9], &[5, 5], &[2, 2][..]).ints("strides", &[2, 2]).ints("pads", &[0, 0, 1, 1]);
    c.push(strided.opsets(&[18, 21]).what("strides, pads"));
    for mode in ["reflect", "edge", "wrap"] {
        let opsets: &[i64] = if mode == "wrap" { &[19, 21] } else { &[17, 21] };
        c.push(case("Pad", vec![by(&[4, 3]), fixed(&[2, 1, 1, 2])]).string("mode", mode).opsets(opsets).what("mode"));
    }
    c.push(case("DepthToSpace", vec![by(&[2, 8, 2, 3])]).int("blocksize", 2).string("mode", "CRD").what("CRD"));
}
