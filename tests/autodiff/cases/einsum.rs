//! Einsum: contractions, diagonals, labels of one operand alone, ellipses that broadcast.

use super::*;

pub fn add(c: &mut Vec<Case>) {
    let equations: [(&'static str, &[&[usize]]); 17] = [
        ("ij,jk->ik", &[&[2, 3], &[3, 4]]),
        ("bij,bkj->bik", &[&[2, 3, 4], &[2, 5, 4]]),
        ("bqhd,bkhd->bhqk", &[&[2, 3, 2, 4], &[2, 5, 2, 4]]),
        ("bhqk , bkhd -> bqhd", &[&[2, 2, 3, 5], &[2, 5, 2, 4]]),
        ("i,j->ij", &[&[3], &[4]]),
        ("i,i->", &[&[3], &[3]]),
        ("i,i", &[&[3], &[3]]),
        ("ij->ji", &[&[2, 3]]),
        ("ij->i", &[&[2, 3]]),
        ("ij->", &[&[2, 3]]),
        ("ba", &[&[2, 3]]),
        ("ijk,k->i", &[&[2, 3, 4], &[4]]),
        ("ii->i", &[&[3, 3]]),
        ("bii->b", &[&[2, 3, 3]]),
        ("...ij,...jk->...ik", &[&[5, 2, 3], &[5, 3, 4]]),
        ("...d,d->...", &[&[2, 3, 4], &[4]]),
        ("ij,jk,kl->il", &[&[2, 3], &[3, 4], &[4, 2]]),
    ];
    for (equation, shapes) in equations {
        let args = shapes.iter().map(|dims| by(dims)).collect();
        c.push(case("Einsum", args).string("equation", equation).what(equation));
    }
    let broadcast = vec![by(&[1, 2, 3]), by(&[5, 3, 4])];
    c.push(case("Einsum", broadcast).string("equation", "...ij,...jk->...ik").what("ellipsis broadcasts"));
}
