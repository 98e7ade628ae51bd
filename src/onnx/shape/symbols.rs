//! Arithmetic on dimensions: every expression has one canonical form, so that `batch * seq` reached by two paths is
//! the same symbol.
//!
//! A symbol stands for a polynomial with integer coefficients over atoms. An atom is a named dimension, an unknown, or
//! a function that is not a polynomial (a quotient that does not divide out, a minimum, …) of other dimensions. Both
//! are interned; a polynomial that is a constant is [`Dim::Known`].

use std::collections::{BTreeMap, HashMap};

use super::Dim;

/// Atoms with multiplicity, ascending.
type Monomial = Vec<u32>;
/// Coefficient of each monomial; none is zero.
type Polynomial = BTreeMap<Monomial, i64>;

/// Larger polynomials become atoms, which bounds the cost of hostile graphs.
const MAX_TERMS: usize = 32;
const MAX_DEGREE: usize = 16;
/// Expressions looked at for one comparison.
const FUEL: u32 = 100;

/// What is not a polynomial of its arguments (or too large a one).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Function {
    Sum,
    Product,
    /// Integer division, towards zero.
    Quotient,
    Remainder,
    Min,
    Max,
    /// The common size of dimensions that are broadcast together: all that are not 1 are equal.
    Broadcast,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Atom {
    /// A dimension that the model names.
    Named(String),
    /// A dimension nothing is known of; the number keeps it apart from others.
    Size(u32),
    /// An integer nothing is known of, not even its sign.
    Integer(u32),
    Call(Function, Vec<Dim>),
}

/// All symbols of a model.
#[derive(Debug, Clone, Default)]
pub(super) struct Symbols {
    polynomials: Vec<Polynomial>,
    polynomial_ids: HashMap<Polynomial, u32>,
    atoms: Vec<Atom>,
    atom_ids: HashMap<Atom, u32>,
}

impl Symbols {
    /// The dimension called `name`; the same name is the same symbol.
    pub fn named(&mut self, name: &str) -> Dim {
        self.atom(Atom::Named(name.into()))
    }

    /// A dimension (so not negative) that is like no other.
    pub fn fresh(&mut self) -> Dim {
        self.atom(Atom::Size(self.atoms.len() as u32))
    }

    /// An integer that is like no other.
    pub fn fresh_integer(&mut self) -> Dim {
        self.atom(Atom::Integer(self.atoms.len() as u32))
    }

    /// True for a dimension of which nothing is known (see [`Symbols::fresh`]).
    pub fn is_fresh(&self, dim: Dim) -> bool {
        matches!(self.single(dim), Some(Atom::Size(_) | Atom::Integer(_)))
    }

    /// True where a declaration could say more: an unknown, or a common size of broadcast dimensions.
    pub fn is_open(&self, dim: Dim) -> bool {
        self.is_fresh(dim) || matches!(self.single(dim), Some(Atom::Call(Function::Broadcast, _)))
    }

    /// True where the dimension depends on named dimensions alone.
    pub fn is_bound(&self, dim: Dim) -> bool {
        self.polynomial(dim).keys().flatten().all(|atom| match &self.atoms[*atom as usize] {
            Atom::Named(_) => true,
            Atom::Size(_) | Atom::Integer(_) => false,
            Atom::Call(_, args) => args.iter().all(|d| self.is_bound(*d)),
        })
    }

    pub fn add(&mut self, a: Dim, b: Dim) -> Dim {
        match scaled_sum(&self.polynomial(a), &self.polynomial(b), 1) {
            Some(sum) => self.intern(sum),
            None => self.commutative(Function::Sum, a, b),
        }
    }

    pub fn sub(&mut self, a: Dim, b: Dim) -> Dim {
        match scaled_sum(&self.polynomial(a), &self.polynomial(b), -1) {
            Some(difference) => self.intern(difference),
            None => self.fresh_integer(),
        }
    }

    pub fn mul(&mut self, a: Dim, b: Dim) -> Dim {
        match product(&self.polynomial(a), &self.polynomial(b)) {
            Some(product) => self.intern(product),
            None => self.commutative(Function::Product, a, b),
        }
    }

    /// Integer division towards zero.
    pub fn div(&mut self, a: Dim, b: Dim) -> Dim {
        match (a, b) {
            (Dim::Known(a), Dim::Known(b)) => match a.checked_div(b) {
                Some(q) => Dim::Known(q),
                None => self.fresh_integer(),
            },
            _ => match self.div_exact(a, b) {
                Some(quotient) => quotient,
                None => self.call(Function::Quotient, vec![a, b]),
            },
        }
    }

    /// `a / b` where `b` divides `a` whatever the symbols are.
    pub fn div_exact(&mut self, a: Dim, b: Dim) -> Option<Dim> {
        let quotient = quotient(&self.polynomial(a), &self.polynomial(b))?;
        Some(self.intern(quotient))
    }

    /// Remainder of division towards zero (equal to the floored one where neither is negative).
    pub fn rem(&mut self, a: Dim, b: Dim) -> Dim {
        match (a, b) {
            (Dim::Known(a), Dim::Known(b)) => match a.checked_rem(b) {
                Some(r) => Dim::Known(r),
                None => self.fresh_integer(),
            },
            _ if self.div_exact(a, b).is_some() => Dim::Known(0),
            _ => self.call(Function::Remainder, vec![a, b]),
        }
    }

    /// ⌈a / n⌉ for `a` that is not negative and a known `n`.
    pub fn div_ceil(&mut self, a: Dim, n: i64) -> Dim {
        let raised = self.add(a, Dim::Known(n.saturating_sub(1)));
        self.div(raised, Dim::Known(n))
    }

    pub fn min(&mut self, a: Dim, b: Dim) -> Dim {
        if self.at_most(a, b) {
            a
        } else if self.at_most(b, a) {
            b
        } else {
            self.commutative(Function::Min, a, b)
        }
    }

    pub fn max(&mut self, a: Dim, b: Dim) -> Dim {
        if self.at_most(a, b) {
            b
        } else if self.at_most(b, a) {
            a
        } else {
            self.commutative(Function::Max, a, b)
        }
    }

    /// The size that `a` and `b` give when they are broadcast together.
    pub fn broadcast(&mut self, a: Dim, b: Dim) -> Dim {
        match (a, b) {
            _ if a == b => a,
            (Dim::Known(1), other) | (other, Dim::Known(1)) => other,
            (Dim::Known(n), _) | (_, Dim::Known(n)) => Dim::Known(n),
            _ => {
                let mut parts: Vec<Dim> = Vec::new();
                for dim in [a, b] {
                    match self.single(dim) {
                        Some(Atom::Call(Function::Broadcast, args)) => parts.extend(args),
                        _ => parts.push(dim),
                    }
                }
                parts.sort_unstable_by_key(key);
                parts.dedup();
                let all = parts.clone();
                parts.retain(|part| !self.follows(*part, &all));
                match parts[..] {
                    [only] => only,
                    _ => self.call(Function::Broadcast, parts),
                }
            }
        }
    }

    /// True for `min(n, x)` beside `x` with known `n > 1`, as when a table of `n` positions is cut to the length `x`:
    /// broadcast together they give `x` in every run where they can be (`x <= n`, or both are 1).
    fn follows(&self, part: Dim, all: &[Dim]) -> bool {
        let Some(Atom::Call(Function::Min, args)) = self.single(part) else { return false };
        matches!(args[..], [Dim::Known(n), x] if n > 1 && x != part && all.contains(&x))
    }

    pub fn product(&mut self, dims: &[Dim]) -> Dim {
        dims.iter().fold(Dim::Known(1), |n, d| self.mul(n, *d))
    }

    /// Product of `over` divided by that of `under`, after equal factors are cancelled.
    pub fn quotient_of_products(&mut self, over: &[Dim], under: &[Dim]) -> Dim {
        let mut over = over.to_vec();
        let mut rest = Vec::new();
        for dim in under {
            match over.iter().position(|d| d == dim) {
                Some(i) => drop(over.swap_remove(i)),
                None => rest.push(*dim),
            }
        }
        let (over, under) = (self.product(&over), self.product(&rest));
        self.div(over, under)
    }

    /// True where `a <= b` in every run.
    pub fn at_most(&mut self, a: Dim, b: Dim) -> bool {
        match (a, b) {
            (Dim::Known(a), Dim::Known(b)) => a <= b,
            _ => scaled_sum(&self.polynomial(b), &self.polynomial(a), -1)
                .and_then(|d| self.lower_bound(&d, &mut { FUEL }))
                .is_some_and(|low| low >= 0),
        }
    }

    /// Whether `a == b`: `Some` where it is the same in every run.
    pub fn equal(&mut self, a: Dim, b: Dim) -> Option<bool> {
        if a == b {
            return Some(true);
        }
        (self.less(a, b) == Some(true) || self.less(b, a) == Some(true)).then_some(false)
    }

    /// Whether `a < b`: `Some` where it is the same in every run.
    pub fn less(&mut self, a: Dim, b: Dim) -> Option<bool> {
        let next = self.add(a, Dim::Known(1));
        if self.at_most(next, b) {
            Some(true)
        } else if self.at_most(b, a) {
            Some(false)
        } else {
            None
        }
    }

    /// The expression in the model's own names.
    pub fn show(&self, dim: Dim) -> String {
        let terms: Vec<String> = self
            .polynomial(dim)
            .iter()
            .rev()
            .map(|(monomial, coefficient)| {
                let atoms = monomial.iter().map(|a| self.show_atom(*a));
                let number = (*coefficient != 1 || monomial.is_empty()).then(|| coefficient.to_string());
                number.into_iter().chain(atoms).collect::<Vec<_>>().join("*")
            })
            .collect();
        if terms.is_empty() { "0".into() } else { terms.join(" + ") }
    }

    fn show_atom(&self, atom: u32) -> String {
        match &self.atoms[atom as usize] {
            Atom::Named(name) => name.clone(),
            Atom::Size(n) | Atom::Integer(n) => format!("?{n}"),
            Atom::Call(function, args) => {
                let args: Vec<String> = args.iter().map(|d| self.show(*d)).collect();
                format!("{function:?}({})", args.join(", ")).to_lowercase()
            }
        }
    }

    fn commutative(&mut self, function: Function, a: Dim, b: Dim) -> Dim {
        let mut args = vec![a, b];
        args.sort_unstable_by_key(key);
        self.call(function, args)
    }

    fn call(&mut self, function: Function, args: Vec<Dim>) -> Dim {
        self.atom(Atom::Call(function, args))
    }

    fn atom(&mut self, atom: Atom) -> Dim {
        let next = self.atoms.len() as u32;
        let id = *self.atom_ids.entry(atom.clone()).or_insert(next);
        if id == next {
            self.atoms.push(atom);
        }
        self.intern(Polynomial::from([(vec![id], 1)]))
    }

    fn intern(&mut self, polynomial: Polynomial) -> Dim {
        if polynomial.keys().all(Vec::is_empty) {
            return Dim::Known(polynomial.values().sum());
        }
        let next = self.polynomials.len() as u32;
        let id = *self.polynomial_ids.entry(polynomial.clone()).or_insert(next);
        if id == next {
            self.polynomials.push(polynomial);
        }
        Dim::Symbol(id)
    }

    fn polynomial(&self, dim: Dim) -> Polynomial {
        match dim {
            Dim::Known(0) => Polynomial::new(),
            Dim::Known(n) => Polynomial::from([(Vec::new(), n)]),
            Dim::Symbol(id) => self.polynomials.get(id as usize).cloned().unwrap_or_default(),
        }
    }

    /// The atom that `dim` is, where it is nothing else.
    fn single(&self, dim: Dim) -> Option<Atom> {
        let polynomial = self.polynomial(dim);
        let (monomial, 1) = polynomial.first_key_value()? else { return None };
        let (&[atom], 1) = (monomial.as_slice(), polynomial.len()) else { return None };
        self.atoms.get(atom as usize).cloned()
    }

    /// A number the polynomial is never below (dimensions are not negative).
    fn lower_bound(&self, polynomial: &Polynomial, fuel: &mut u32) -> Option<i64> {
        *fuel = fuel.checked_sub(1)?;
        let direct = polynomial.iter().try_fold(0i64, |sum, (monomial, coefficient)| {
            sum.checked_add(self.term_lower_bound(monomial, *coefficient, fuel)?)
        });
        // Else with a minimum that is subtracted, or a maximum that is added, replaced by one of its arguments.
        direct.or_else(|| {
            polynomial
                .iter()
                .filter_map(|(monomial, coefficient)| {
                    let &[atom] = monomial.as_slice() else { return None };
                    let args = match &self.atoms[atom as usize] {
                        Atom::Call(Function::Min, args) if *coefficient < 0 => args,
                        Atom::Call(Function::Max, args) if *coefficient > 0 => args,
                        _ => return None,
                    };
                    let mut rest = polynomial.clone();
                    rest.remove(monomial);
                    args.iter()
                        .filter_map(|arg| {
                            let replaced = scaled_sum(&rest, &self.polynomial(*arg), *coefficient)?;
                            self.lower_bound(&replaced, fuel)
                        })
                        .max()
                })
                .max()
        })
    }

    fn term_lower_bound(&self, monomial: &Monomial, coefficient: i64, fuel: &mut u32) -> Option<i64> {
        match monomial.as_slice() {
            [] => Some(coefficient),
            _ if coefficient < 0 => None,
            [atom] => self.atom_lower_bound(*atom, fuel)?.checked_mul(coefficient),
            atoms => atoms.iter().try_fold(coefficient, |product, atom| {
                product.checked_mul(self.atom_lower_bound(*atom, fuel).filter(|low| *low >= 0)?)
            }),
        }
    }

    fn atom_lower_bound(&self, atom: u32, fuel: &mut u32) -> Option<i64> {
        let (function, args) = match &self.atoms[atom as usize] {
            Atom::Named(_) | Atom::Size(_) => return Some(0),
            Atom::Integer(_) => return None,
            Atom::Call(function, args) => (*function, args),
        };
        let lows: Vec<Option<i64>> = args.iter().map(|arg| self.lower_bound(&self.polynomial(*arg), fuel)).collect();
        match function {
            Function::Max => lows.into_iter().flatten().max(),
            Function::Min => lows.into_iter().try_fold(i64::MAX, |low, next| Some(low.min(next?))),
            _ => lows.iter().all(|low| low.is_some_and(|low| low >= 0)).then_some(0),
        }
    }
}

fn key(dim: &Dim) -> (bool, i64) {
    match dim {
        Dim::Known(n) => (false, *n),
        Dim::Symbol(id) => (true, i64::from(*id)),
    }
}

/// `a + k * b`; `None` where a coefficient overflows or there are too many terms.
fn scaled_sum(a: &Polynomial, b: &Polynomial, k: i64) -> Option<Polynomial> {
    let mut sum = a.clone();
    for (monomial, coefficient) in b {
        add_term(&mut sum, monomial.clone(), coefficient.checked_mul(k)?)?;
    }
    (sum.len() <= MAX_TERMS).then_some(sum)
}

fn product(a: &Polynomial, b: &Polynomial) -> Option<Polynomial> {
    let mut product = Polynomial::new();
    for (m, c) in a {
        for (n, d) in b {
            let mut monomial: Monomial = m.iter().chain(n).copied().collect();
            monomial.sort_unstable();
            if monomial.len() > MAX_DEGREE {
                return None;
            }
            add_term(&mut product, monomial, c.checked_mul(*d)?)?;
        }
    }
    (product.len() <= MAX_TERMS).then_some(product)
}

fn add_term(polynomial: &mut Polynomial, monomial: Monomial, coefficient: i64) -> Option<()> {
    let total = polynomial.get(&monomial).copied().unwrap_or(0).checked_add(coefficient)?;
    if total == 0 {
        polynomial.remove(&monomial);
    } else {
        polynomial.insert(monomial, total);
    }
    Some(())
}

/// Division by leading terms in graded order; `None` where a remainder is left.
fn quotient(a: &Polynomial, b: &Polynomial) -> Option<Polynomial> {
    let leading = |p: &Polynomial| {
        // Sorted atom lists of one degree compare inversely to graded lexicographic order, hence the minimum.
        let degree = p.keys().map(Vec::len).max()?;
        p.iter().find(|(m, _)| m.len() == degree).map(|(m, c)| (m.clone(), *c))
    };
    let (divisor, by) = leading(b)?;
    let mut rest = a.clone();
    let mut quotient = Polynomial::new();
    while let Some((monomial, coefficient)) = leading(&rest) {
        let mut factor = monomial;
        for atom in &divisor {
            factor.remove(factor.iter().position(|a| a == atom)?);
        }
        if coefficient.checked_rem(by)? != 0 {
            return None;
        }
        let term = Polynomial::from([(factor, coefficient / by)]);
        rest = scaled_sum(&rest, &product(&term, b)?, -1)?;
        quotient = scaled_sum(&quotient, &term, 1)?;
    }
    Some(quotient)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: Dim = Dim::Known(1);

    #[test]
    fn one_form_for_each_expression() {
        let mut s = Symbols::default();
        let (b, t) = (s.named("b"), s.named("t"));
        assert_eq!(b, s.named("b"));
        assert_ne!(b, t);
        assert_eq!(s.mul(b, t), s.mul(t, b));
        let twice = s.add(b, b);
        assert_eq!(twice, s.mul(Dim::Known(2), b));
        assert_eq!(s.sub(twice, b), b);
        assert_eq!(s.sub(b, b), Dim::Known(0));
        assert_eq!((s.mul(b, ONE), s.div(b, ONE), s.add(b, Dim::Known(0))), (b, b, b));
        assert_eq!(s.div(t, Dim::Known(2)), s.div(t, Dim::Known(2)));
        assert_ne!(s.div(t, Dim::Known(2)), s.div(b, Dim::Known(2)));
        let (x, y) = (s.fresh(), s.fresh());
        assert_ne!(x, y);
    }

    #[test]
    fn quotients_cancel_exactly() {
        let mut s = Symbols::default();
        let (b, p, t) = (s.named("b"), s.named("p"), s.named("t"));
        let total = s.add(p, t);
        let size = s.product(&[b, total, Dim::Known(384)]);
        let under = s.product(&[total, Dim::Known(12)]);
        let want = s.mul(b, Dim::Known(32));
        assert_eq!(s.div(size, under), want);
        assert_eq!(s.quotient_of_products(&[b, t, Dim::Known(384)], &[b, t, Dim::Known(12)]), Dim::Known(32));
        let odd = s.add(b, ONE);
        assert_eq!(s.div_exact(odd, Dim::Known(2)), None);
        assert_eq!(s.div_exact(size, odd), None);
        let by_zero = s.div(Dim::Known(7), Dim::Known(0));
        assert!(s.is_fresh(by_zero));
    }

    #[test]
    fn bounds_decide_comparisons() {
        let mut s = Symbols::default();
        let (b, p) = (s.named("b"), s.named("p"));
        let total = s.add(p, b);
        assert!(s.at_most(p, total) && !s.at_most(total, p));
        assert_eq!(s.equal(b, Dim::Known(-1)), Some(false));
        assert_eq!(s.equal(b, p), None);
        assert_eq!(s.less(b, Dim::Known(0)), Some(false));
        let x = s.fresh_integer();
        assert_eq!(s.equal(x, Dim::Known(-1)), None);
        let few = s.min(ONE, b);
        assert!(s.at_most(few, b), "a minimum is at most each argument");
        assert_eq!(s.min(p, total), p);
        assert_eq!(s.max(p, total), total);
    }

    #[test]
    fn broadcast_absorbs() {
        let mut s = Symbols::default();
        let (b, c) = (s.named("b"), s.named("c"));
        let both = s.broadcast(b, c);
        assert_ne!(both, b);
        assert_eq!(s.broadcast(c, b), both);
        assert_eq!(s.broadcast(both, b), both);
        assert_eq!(s.broadcast(b, ONE), b);
        assert_eq!(s.broadcast(b, Dim::Known(7)), Dim::Known(7));
        let cut = s.min(b, Dim::Known(32));
        assert_eq!(s.broadcast(cut, b), b, "a table cut to length");
        assert_ne!(s.broadcast(cut, c), c);
        let one = s.min(b, ONE);
        assert_ne!(s.broadcast(one, b), one);
    }

    #[test]
    fn no_overflow_and_no_blow_up() {
        let mut s = Symbols::default();
        let b = s.named("b");
        let huge = s.mul(b, Dim::Known(i64::MAX));
        let more = s.mul(huge, huge);
        assert_eq!(more, s.mul(huge, huge), "still one form");
        let mut all = b;
        for i in 0..100 {
            let next = s.named(&i.to_string());
            all = s.add(all, next);
            let next = s.add(next, ONE);
            all = s.mul(all, next);
        }
        assert!(s.polynomial(all).len() <= MAX_TERMS);
    }
}
