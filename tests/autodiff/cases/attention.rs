//! Attention and rotary embedding, of the default domain and ONNX Runtime's.

use bone_onnx::onnx::Tensor;

use super::{Arg, Case, MS, Random, between, by, case, given, index, ints};

pub fn add(c: &mut Vec<Case>) {
    attention(c);
    rotary(c);
    fused_attention(c);
    multi_head(c);
    group_query(c);
}

/// Truth values, `false` at these places.
fn truth(dims: &[usize], hidden: &[usize]) -> Arg {
    let n = dims.iter().product();
    let seen = (0..n).map(|i| !hidden.contains(&i)).collect();
    Arg::Given(Tensor::Bool(ndarray::ArrayD::from_shape_vec(ndarray::IxDyn(dims), seen).unwrap()))
}

fn int32(dims: &[usize], values: &[i32]) -> Arg {
    Arg::Given(Tensor::new(dims, values.to_vec()))
}

fn attention(c: &mut Vec<Case>) {
    let attend = |args| case("Attention", args).single().opsets(&[23]);
    let qkv = || vec![by(&[2, 4, 3, 5]), between(&[2, 4, 6, 5], -1.0, 1.2), between(&[2, 4, 6, 2], -1.2, 1.0)];
    let with = |more: &[Arg]| [qkv(), more.to_vec()].concat();
    let scores = &[true, false, false, true];
    c.push(attend(qkv()).what("rank 4"));
    c.push(attend(qkv()).float("scale", 0.3).float("softcap", 0.8).what("cap"));
    c.push(attend(with(&[by(&[3, 6])])).what("float mask"));
    c.push(attend(with(&[by(&[2, 1, 3, 6])])).int("is_causal", 1).what("float mask, causal"));
    c.push(attend(with(&[truth(&[3, 6], &[4, 8])])).what("truth mask"));
    c.push(attend(with(&[by(&[3, 6])])).float("softcap", 0.8).what("cap, float mask"));
    let past = || [Arg::Missing, by(&[2, 4, 2, 5]), between(&[2, 4, 2, 2], -1.0, 1.0)];
    c.push(attend(with(&past())).int("is_causal", 1).outputs(&[true, true, true]).what("past"));
    let grouped = || vec![by(&[2, 3, 20]), by(&[2, 6, 10]), between(&[2, 6, 4], -1.0, 1.0)];
    let heads = |case: Case| case.int("q_num_heads", 4).int("kv_num_heads", 2);
    c.push(heads(attend(grouped())).what("rank 3, shared heads"));
    for mode in 0..4 {
        let case = attend(with(&[by(&[3, 6])])).int("qk_matmul_output_mode", mode);
        c.push(case.outputs(scores).what("scores"));
    }

    // The first query sees nothing: of its row, no value and no weight moves.
    let nothing: Vec<usize> = (0..6).collect();
    c.push(attend(with(&[truth(&[3, 6], &nothing)])).what("a row hidden"));
    let case = attend(with(&[truth(&[3, 6], &nothing)])).int("qk_matmul_output_mode", 3);
    c.push(case.int("softmax_precision", 11).outputs(scores).what("a row hidden, weights"));
    let mut low = vec![f64::NEG_INFINITY; 6];
    low.extend(Random(8).values(12, -1.0, 1.0));
    low[9] = f64::NEG_INFINITY;
    c.push(attend(with(&[Arg::Float(vec![3, 6], low)])).what("infinite mask"));
    let mut case = attend(with(&[truth(&[2, 1, 3, 6], &nothing)])).int("is_causal", 1);
    c.push(case.clone().what("a row hidden, causal"));
    let lengths = |values: &[i64]| [Arg::Missing, Arg::Missing, Arg::Given(ints(values))];
    case = attend([with(&[Arg::Missing]), lengths(&[4, 5]).to_vec()].concat()).opsets(&[24]);
    c.push(case.clone().what("padding"));
    c.push(case.int("is_causal", 1).what("padding, causal"));
    let hidden = truth(&[2, 1, 3, 6], &nothing);
    case = attend([with(&[hidden]), lengths(&[6, 3]).to_vec()].concat()).opsets(&[24]);
    c.push(case.int("is_causal", 1).what("padding, causal, truth mask"));
    case = attend([with(&[Arg::Missing]), lengths(&[2, 1]).to_vec()].concat()).opsets(&[24]);
    c.push(case.int("is_causal", 1).what("more queries than keys"));
}

fn rotary(c: &mut Vec<Case>) {
    let rotary = |args| case("RotaryEmbedding", args).single().opsets(&[23]);
    let at = || Arg::Given(index(&[2, 3], &[0, 4, 2, 1, 1, 3]));
    for interleaved in [0, 1] {
        let tables = || vec![by(&[2, 4, 3, 6]), by(&[5, 3]), between(&[5, 3], -1.0, 1.0), at()];
        c.push(rotary(tables()).int("interleaved", interleaved).what("positions"));
        let given = vec![by(&[2, 3, 24]), by(&[2, 3, 2]), between(&[2, 3, 2], -1.0, 1.0)];
        let form = rotary(given).int("interleaved", interleaved).int("num_heads", 4);
        c.push(form.int("rotary_embedding_dim", 4).what("rank 3, part of the head"));
    }
    let rotary = |args| case("RotaryEmbedding", args).domain(MS).single().opsets(&[17]);
    for interleaved in [0, 1] {
        let args = vec![by(&[2, 3, 12]), at(), by(&[5, 3]), between(&[5, 3], -1.0, 1.0)];
        // ONNX Runtime reads the scale and does nothing with it.
        c.push(rotary(args).int("interleaved", interleaved).float("scale", 2.0).what("rank 3"));
        let args = vec![by(&[2, 4, 3, 6]), given(&[1]), by(&[5, 3]), between(&[5, 3], -1.0, 1.0)];
        c.push(rotary(args).int("interleaved", interleaved).what("rank 4, first position"));
        let args = vec![by(&[2, 3, 16]), at(), by(&[5, 2]), between(&[5, 2], -1.0, 1.0)];
        let form = rotary(args).int("interleaved", interleaved).int("num_heads", 2);
        c.push(form.int("rotary_embedding_dim", 4).what("part of the head"));
    }
}

/// `com.microsoft.Attention`: with its projections.
fn fused_attention(c: &mut Vec<Case>) {
    let attend = |more: &[Arg]| {
        let args = vec![by(&[2, 3, 6]), between(&[6, 24], -0.6, 0.6), between(&[24], -1.0, 0.7)];
        let case = case("Attention", [args, more.to_vec()].concat()).domain(MS).single().opsets(&[17]);
        case.int("num_heads", 2)
    };
    c.push(attend(&[]).what("plain"));
    c.push(attend(&[]).float("scale", 0.3).int("unidirectional", 1).what("scale, causal"));
    c.push(attend(&[int32(&[2], &[2, 1])]).what("lengths"));
    c.push(attend(&[int32(&[4], &[3, 2, 1, 0])]).what("ends and starts"));
    c.push(attend(&[int32(&[2, 3], &[1, 1, 0, 1, 0, 1])]).float("mask_filter_value", -1.5).what("padding"));
    c.push(attend(&[int32(&[2, 3], &[1, 1, 0, 1, 0, 1])]).int("unidirectional", 1).what("padding, causal"));
    c.push(attend(&[int32(&[2, 1], &[0, 0])]).what("no mask in truth"));
    let pairs: Vec<i32> = (0..18).map(|i| i32::from(i % 3 == 0 || i % 4 == 1)).collect();
    c.push(attend(&[int32(&[2, 3, 3], &pairs)]).what("mask by query"));
    for bias in [&[1, 2, 3, 3], &[2, 1, 3, 3]] {
        c.push(attend(&[int32(&[2, 3], &[1, 1, 0, 1, 0, 1]), Arg::Missing, by(bias)]).what("scores' bias"));
    }
    let past = || by(&[2, 2, 2, 2, 4]);
    let form = attend(&[Arg::Missing, past()]).outputs(&[true, true]);
    c.push(form.clone().what("past"));
    c.push(form.int("unidirectional", 1).what("past, causal"));
    let mask = int32(&[2, 5], &[1, 1, 1, 0, 1, 1, 0, 1, 1, 1]);
    c.push(attend(&[mask, past()]).outputs(&[true, true]).what("past, padding"));
    let args = vec![by(&[2, 3, 6]), between(&[6, 28], -0.6, 0.6), between(&[28], -1.0, 0.7)];
    let form = case("Attention", args).domain(MS).single().opsets(&[17]).int("num_heads", 2);
    c.push(form.ints("qkv_hidden_sizes", &[8, 8, 12]).what("wider values"));
}

fn multi_head(c: &mut Vec<Case>) {
    let multi = |args| case("MultiHeadAttention", args).domain(MS).single().opsets(&[17]).int("num_heads", 2);
    let qkv = || vec![by(&[2, 3, 8]), between(&[2, 5, 8], -1.0, 1.2), between(&[2, 5, 8], -1.2, 1.0)];
    let with = |more: &[Arg]| [qkv(), more.to_vec()].concat();
    c.push(multi(qkv()));
    c.push(multi(with(&[by(&[24])])).float("scale", 0.4).what("bias"));
    let padding = || int32(&[2, 5], &[1, 1, 1, 1, 1, 1, 1, 1, 0, 0]);
    c.push(multi(with(&[Arg::Missing, padding()])).what("padding"));
    c.push(multi(with(&[Arg::Missing, int32(&[2], &[5, 3])])).float("mask_filter_value", -1.5).what("lengths"));
    let pairs: Vec<i32> = (0..30).map(|i| i32::from(i % 5 == 0 || i % 4 == 1)).collect();
    c.push(multi(with(&[Arg::Missing, int32(&[2, 3, 5], &pairs)])).what("mask by query"));
    c.push(multi(with(&[Arg::Missing, Arg::Missing, by(&[1, 2, 3, 5])])).what("scores' bias"));
    let scores = &[true, true, true, true];
    let form = multi(with(&[by(&[24]), padding(), by(&[2, 1, 3, 5])])).float("mask_filter_value", -1.5);
    c.push(form.outputs(scores).what("all at once"));
    c.push(multi(vec![by(&[2, 3, 8]), by(&[2, 3, 8]), by(&[2, 3, 12])]).int("unidirectional", 1).what("causal"));
    let heads = || vec![by(&[2, 3, 8]), by(&[2, 2, 5, 4]), between(&[2, 2, 5, 4], -1.0, 1.2)];
    c.push(multi(heads()).what("another's keys"));
    c.push(multi([heads(), vec![by(&[24])]].concat()).what("another's keys, bias"));
    let past = || vec![Arg::Missing, by(&[2, 2, 2, 4]), between(&[2, 2, 2, 4], -1.0, 1.2)];
    let presents = &[true, true, true];
    let form = multi([with(&[by(&[24]), Arg::Missing]), past()].concat()).outputs(presents);
    c.push(form.what("past, bias"));
    let all = int32(&[2, 7], &[0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 1, 0]);
    c.push(multi([with(&[Arg::Missing, all]), past()].concat()).outputs(presents).what("past, padding"));
    let square = vec![by(&[2, 3, 8]), by(&[2, 3, 8]), between(&[2, 3, 8], -1.0, 1.2), Arg::Missing, Arg::Missing];
    let form = multi([square, past()].concat()).outputs(presents);
    c.push(form.int("unidirectional", 1).what("past, causal"));
}

fn group_query(c: &mut Vec<Case>) {
    let lengths = |last: &[i32]| int32(&[last.len()], last);
    let total = |n: i32| int32(&[1], &[n]);
    // Batch, tokens, size of a head; the past; index of each last token, tokens in all; further inputs.
    let group = |dims: [usize; 3], past: [Arg; 2], last: &[i32], all: i32, more: Vec<Arg>| {
        let [batch, length, size] = dims;
        let qkv = vec![
            by(&[batch, length, 4 * size]),
            by(&[batch, length, 2 * size]),
            between(&[batch, length, 2 * size], -1.0, 1.0),
        ];
        let args = [qkv, past.to_vec(), vec![lengths(last), total(all)], more].concat();
        let case = case("GroupQueryAttention", args).domain(MS).single().opsets(&[17]);
        case.int("num_heads", 4).int("kv_num_heads", 2)
    };
    let (kept, presents) = (&[true, false, false], &[true, true, true]);
    let none = || [Arg::Missing, Arg::Missing];
    let empty = |n: usize| vec![Arg::Missing; n];
    let prompt = |more: Vec<Arg>| group([2, 3, 8], none(), &[2, 2], 3, more);
    c.push(prompt(vec![]).outputs(kept).what("prompt"));
    c.push(prompt(vec![]).outputs(presents).what("prompt, keys and values"));
    c.push(group([2, 3, 8], none(), &[1, 2], 3, vec![]).outputs(kept).what("shorter sample"));
    c.push(prompt(vec![]).int("local_window_size", 2).float("softcap", 0.7).outputs(kept).what("window, cap"));
    c.push(prompt(vec![]).int("causal", 0).float("scale", 0.3).outputs(kept).what("not causal"));
    c.push(prompt(vec![]).int("smooth_softmax", 1).outputs(kept).what("smooth"));
    let bias = |dims: &[usize]| [empty(3), vec![by(dims)]].concat();
    c.push(prompt(bias(&[1, 4, 3, 3])).float("softcap", 0.7).outputs(kept).what("scores' bias"));
    c.push(prompt([bias(&[2, 1, 3, 3]), vec![by(&[4])]].concat()).outputs(kept).what("scores' bias, sinks"));
    for seen in [1, 2] {
        let form = prompt(bias(&[1, 1, 3, 3])).int("qk_output", seen).float("softcap", 0.7);
        c.push(form.outputs(&[true, false, false, true]).what("scores"));
    }
    let past = |batch: usize, room: usize, size: usize| [by(&[batch, 2, room, size]), by(&[batch, 2, room, size])];
    let more = |all| group([1, 3, 8], past(1, 2, 8), &[4], 5, all);
    c.push(more(vec![]).outputs(presents).what("past"));
    c.push(group([1, 3, 8], past(1, 8, 8), &[4], 5, bias(&[1, 1, 3, 5])).outputs(presents).what("buffer, bias"));
    c.push(group([2, 3, 8], past(2, 8, 8), &[2, 2], 3, vec![]).outputs(presents).what("buffer, prompt"));
    let one = |more| group([2, 1, 8], past(2, 8, 8), &[3, 4], 5, more);
    c.push(one(vec![]).outputs(presents).what("one token"));
    c.push(one(vec![]).int("local_window_size", 2).int("smooth_softmax", 1).outputs(presents).what("one, window"));
    let scores = &[true, true, true, true];
    let form = more(vec![]).int("qk_output", 2).int("smooth_softmax", 1).int("causal", 0);
    c.push(form.outputs(scores).what("past, scores"));

    // The engine turns heads whose size is a multiple of 16 alone.
    let table = |width: usize, seed| Arg::Float(vec![12, width], Random(seed).values(12 * width, -1.0, 1.0));
    let tables = |width: usize| vec![table(width, 3), table(width, 4)];
    let turned = |case: Case| case.int("do_rotary", 1);
    for interleaved in [0, 1] {
        let form = turned(group([2, 3, 16], none(), &[2, 2], 3, tables(8))).int("rotary_interleaved", interleaved);
        c.push(form.outputs(presents).what("rotary"));
        let form = turned(group([1, 3, 16], past(1, 8, 16), &[4], 5, tables(8)));
        c.push(form.int("rotary_interleaved", interleaved).outputs(presents).what("rotary, past"));
    }
    c.push(turned(group([2, 3, 32], none(), &[2, 2], 3, tables(8))).outputs(kept).what("part of the head"));
    let at = |dims: &[usize], values: &[i64]| [tables(8), vec![Arg::Given(index(dims, values))]].concat();
    let form = group([2, 3, 16], none(), &[2, 2], 3, at(&[2, 3], &[1, 0, 4, 2, 2, 3]));
    c.push(turned(form).outputs(kept).what("positions of a prompt"));
    let form = group([2, 1, 16], past(2, 8, 16), &[3, 4], 5, at(&[2, 1], &[7, 2]));
    c.push(turned(form).outputs(presents).what("positions"));
    let packed = [vec![by(&[2, 3, 128])], empty(4), vec![lengths(&[2, 2]), total(3)], tables(8)].concat();
    let form = case("GroupQueryAttention", packed).domain(MS).single().opsets(&[17]);
    c.push(turned(form.int("num_heads", 4).int("kv_num_heads", 2)).outputs(kept).what("packed"));
}
