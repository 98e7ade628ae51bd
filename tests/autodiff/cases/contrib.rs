//! Operators of ONNX Runtime's own domain, but for attention.

use bone_onnx::onnx::{AttributeProto, Tensor};

use super::{Arg, Case, MS, Random, between, by, case};

pub fn add(c: &mut Vec<Case>) {
    products(c);
    fused(c);
    quantized(c);
    activations(c);
    normalizations(c);
}

fn ms(op: &'static str, args: Vec<Arg>) -> Case {
    case(op, args).domain(MS).single().opsets(&[17])
}

fn products(c: &mut Vec<Case>) {
    for (ta, tb) in [(0, 0), (1, 0), (0, 1), (1, 1)] {
        let (a, b): (&[usize], &[usize]) =
            (if ta == 1 { &[3, 2] } else { &[2, 3] }, if tb == 1 { &[4, 3] } else { &[3, 4] });
        let form = |op, args| ms(op, args).int("transA", ta).int("transB", tb).float("alpha", 0.5);
        let shapes: [(&[usize], &[usize]); 3] = [(&[], &[]), (&[5], &[5]), (&[5], &[])];
        for (batch_a, batch_b) in shapes {
            let args = || vec![by(&[batch_a, a].concat()), by(&[batch_b, b].concat())];
            c.push(form("FusedMatMul", args()));
            c.push(form("TransposeMatMul", args()));
        }
        let moved = |x: &[usize]| vec![x[0], 5, 6, x[1]];
        let put = |x: &[usize]| vec![5, 6, x[0], x[1]];
        for (ma, mb) in [(0, 1), (1, 0), (1, 1)] {
            let args = vec![by(&if ma == 1 { moved(a) } else { put(a) }), by(&if mb == 1 { moved(b) } else { put(b) })];
            let case = form("FusedMatMul", args).int("transBatchA", ma).int("transBatchB", mb);
            c.push(case.what("moved batch"));
        }
    }
    c.push(ms("FusedMatMul", vec![by(&[3]), by(&[3, 4])]).float("alpha", 0.5).what("vector"));
    c.push(ms("FusedMatMul", vec![by(&[2, 3]), by(&[3])]).int("transB", 1).what("vector on the right"));
    let wide = case("FusedMatMul", vec![by(&[5, 2, 3]), by(&[4, 3])]).domain(MS).opsets(&[17]);
    c.push(wide.int("transB", 1).float("alpha", 0.5).what("double"));
}

fn fused(c: &mut Vec<Case>) {
    let gemm = |activation| {
        let args = vec![by(&[3, 4]), by(&[4, 5]), between(&[5], -1.0, 0.5)];
        ms("FusedGemm", args).string("activation", activation)
    };
    c.push(gemm("Sigmoid").int("transA", 0).float("alpha", 0.4).float("beta", 0.7));
    for activation in ["Tanh", "Softplus", "Softsign"] {
        c.push(gemm(activation).what(activation));
    }
    // Sums around ±2.5, away from the kinks.
    let near = |activation| {
        let x = |dims: &[usize], seed| Arg::By(dims.to_vec(), Random(seed).values(dims.iter().product(), -0.5, 0.5));
        let far = Arg::Float(vec![2, 3], vec![2.5, -2.5, 2.5, -2.5, 2.5, -2.5]);
        let case = ms("FusedGemm", vec![x(&[4, 2], 2), x(&[3, 4], 5), far]).string("activation", activation);
        case.int("transA", 1).int("transB", 1).what(activation)
    };
    c.push(near("Relu"));
    c.push(near("LeakyRelu").float("activation_alpha", 0.3));
    c.push(near("Elu").float("activation_alpha", 1.3));
    c.push(near("Selu").float("activation_alpha", 1.2).float("activation_gamma", 0.7));
    c.push(near("ThresholdedRelu").float("activation_alpha", 0.1));
    c.push(near("HardSigmoid").float("activation_alpha", 0.2).float("activation_beta", 0.9));

    let conv = |more: &[Arg], activation: &'static str, parameters: &[f32]| {
        let args = [vec![by(&[1, 2, 4, 4]), by(&[2, 2, 3, 3])], more.to_vec()].concat();
        let case = ms("FusedConv", args).string("activation", activation).ints("strides", &[1, 1]);
        match parameters {
            [] => case,
            _ => case.attr(AttributeProto { floats: parameters.to_vec(), ..floats("activation_params") }),
        }
    };
    let smooth = || [by(&[2]), by(&[1, 2, 2, 2])];
    c.push(conv(&smooth(), "Tanh", &[]).what("Tanh, sum"));
    c.push(conv(&[], "Sigmoid", &[]).what("Sigmoid"));
    // Biases that keep every sum away from the kinks.
    let bias = |values: [f64; 2]| vec![Arg::Float(vec![2], values.to_vec())];
    c.push(conv(&bias([19.0, -18.0]), "Relu", &[]).what("Relu"));
    c.push(conv(&bias([19.0, -18.0]), "LeakyRelu", &[0.3]).what("LeakyRelu"));
    c.push(conv(&bias([0.0, 40.0]), "Clip", &[-20.0, 20.0]).what("Clip"));
    c.push(conv(&bias([0.0, 40.0]), "HardSigmoid", &[0.02, 0.5]).what("HardSigmoid"));
    let plain = ms("FusedConv", vec![by(&[1, 2, 4, 4]), by(&[2, 2, 3, 3])]);
    c.push(plain.what("no activation"));
}

fn floats(name: &str) -> AttributeProto {
    let mut attribute = AttributeProto::ints(name, &[]);
    attribute.r#type = Some(bone_onnx::onnx::proto::attribute_proto::AttributeType::Floats as i32);
    attribute
}

fn quantized(c: &mut Vec<Case>) {
    let bytes = |dims: &[usize], seed: u64| {
        let mut random = Random(seed);
        let n: usize = dims.iter().product();
        let values = (0..n).map(|_| random.bits() as u8).collect();
        Arg::Const(Tensor::U8(ndarray::ArrayD::from_shape_vec(ndarray::IxDyn(dims), values).unwrap()))
    };
    let product = |bits: i64, k: i64, args| {
        ms("MatMulNBits", args).int("bits", bits).int("K", k).int("N", 3).int("block_size", 16)
    };
    let scales = || Arg::FloatConst(vec![9], Random(9).values(9, 0.1, 0.3));
    c.push(product(4, 40, vec![by(&[2, 2, 40]), bytes(&[3, 3, 8], 1), scales()]).what("4 bits"));
    c.push(product(4, 40, vec![by(&[2, 40]), bytes(&[3, 3, 8], 2), scales(), bytes(&[6], 3)]).what("zero points"));
    let bias = |zeros: Arg, bits: usize| {
        vec![by(&[2, 40]), bytes(&[3, 3, 2 * bits], 5), scales(), zeros, Arg::Missing, by(&[3])]
    };
    let zeros = Arg::FloatConst(vec![9], Random(4).values(9, 4.0, 9.0));
    c.push(product(4, 40, bias(zeros, 4)).what("float zero points, bias"));
    c.push(product(8, 48, vec![by(&[2, 48]), bytes(&[3, 3, 16], 4), scales()]).what("8 bits"));
    c.push(product(8, 40, bias(bytes(&[9], 6), 8)).what("8 bits, zero points, bias"));
    c.push(product(2, 40, bias(bytes(&[3], 6), 2)).what("2 bits, zero points, bias"));
    c.push(product(2, 40, vec![by(&[2, 40]), bytes(&[3, 3, 4], 7), scales()]).what("2 bits"));
}

fn activations(c: &mut Vec<Case>) {
    let x = || between(&[2, 3, 4], -2.5, 2.5);
    c.push(ms("Gelu", vec![x()]));
    c.push(ms("QuickGelu", vec![x()]));
    c.push(ms("QuickGelu", vec![x()]).float("alpha", 1.0).what("SiLU"));
    c.push(ms("FastGelu", vec![x()]));
    c.push(ms("FastGelu", vec![x(), by(&[4])]).what("bias"));
    c.push(ms("BiasGelu", vec![x(), by(&[4])]));
}

fn normalizations(c: &mut Vec<Case>) {
    let x = || between(&[2, 3, 4], -2.5, 2.5);
    for sum in [false, true] {
        let outputs: &[bool] = if sum { &[true, false, false, true] } else { &[true] };
        let form = |op, skip: &[usize], more: Vec<Arg>| {
            let args = [vec![x(), by(skip)], more].concat();
            ms(op, args).float("epsilon", 1e-3).outputs(outputs)
        };
        let shift = || between(&[4], 0.0, 1.0);
        let (layer, rms) = ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization");
        c.push(form(layer, &[2, 3, 4], vec![by(&[4]), shift(), shift()]));
        c.push(form(layer, &[2, 3, 4], vec![by(&[4])]).what("no shift"));
        c.push(form(layer, &[3, 4], vec![by(&[4]), Arg::Missing, shift()]).what("skip for all"));
        c.push(form(rms, &[2, 3, 4], vec![by(&[4]), shift()]));
        c.push(form(rms, &[1, 3, 4], vec![by(&[4])]).what("no bias, skip for all"));
    }

    let ids = |dims: &[usize], values: &[i32]| Arg::Given(Tensor::new(dims, values.to_vec()));
    let words = || ids(&[2, 3], &[1, 6, 3, 0, 6, 2]);
    let segments = || [ids(&[2, 3], &[0, 0, 1, 1, 0, 1]), between(&[2, 4], -1.0, 1.2)];
    let embed = |[segments, table]: [Arg; 2], more: &[Arg]| {
        let args = vec![words(), segments, by(&[7, 4]), between(&[5, 4], -1.0, 1.0), table];
        let args = [args, vec![by(&[4]), between(&[4], 0.0, 1.0)], more.to_vec()].concat();
        ms("EmbedLayerNormalization", args).float("epsilon", 1e-3)
    };
    c.push(embed(segments(), &[]).outputs(&[true, false]));
    c.push(embed(segments(), &[]).outputs(&[true, false, true]).what("sum"));
    let places = [Arg::Missing, ids(&[1, 3], &[4, 0, 2])];
    c.push(embed([Arg::Missing, Arg::Missing], &places).outputs(&[true, false, true]).what("positions"));
}
