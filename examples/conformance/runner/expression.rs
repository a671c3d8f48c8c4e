//! Parses arithmetic of metrics in Python's notation: `(1.0-P).mean()`, `2.0*P[0]//R`.

use anyhow::{Context, Result, bail, ensure};
use tch_ignite::metrics::MetricsLambda;

/// The metric that computes an expression of named metrics.
pub fn parse<'a, O>(
    text: &str,
    names: [(&'static str, MetricsLambda<'a, O>); 2],
) -> Result<MetricsLambda<'a, O>> {
    let mut parser = Parser { rest: text, names, depth: 0 };
    let value = parser.sum().with_context(|| format!("the expression {text:?}"))?;
    ensure!(parser.rest.is_empty(), "the expression {text:?} is not understood: {:?}", parser.rest);
    Ok(value.metric())
}

/// A part of an expression. Numbers are kept apart, because Python computes with them before a metric is made.
enum Operand<'a, O> {
    Number(f64),
    Metric(MetricsLambda<'a, O>),
}

impl<'a, O> Operand<'a, O> {
    fn metric(self) -> MetricsLambda<'a, O> {
        match self {
            Self::Number(number) => number.into(),
            Self::Metric(metric) => metric,
        }
    }
}

struct Parser<'t, 'a, O> {
    rest: &'t str,
    names: [(&'static str, MetricsLambda<'a, O>); 2],
    depth: u32,
}

/// How deep expressions may be nested.
const DEEPEST: u32 = 100;

impl<'a, O> Parser<'_, 'a, O> {
    fn skip_spaces(&mut self) {
        self.rest = self.rest.trim_start();
    }

    /// Whether the rest of the text begins with the token, which is then skipped.
    fn take(&mut self, token: &str) -> bool {
        self.skip_spaces();
        match self.rest.strip_prefix(token) {
            Some(rest) => {
                self.rest = rest;
                self.skip_spaces();
                true
            }
            None => false,
        }
    }

    fn expect(&mut self, token: &str) -> Result<()> {
        ensure!(self.take(token), "{token:?} is expected at {:?}", self.rest);
        Ok(())
    }

    fn taken_while(&mut self, belongs: impl Fn(char) -> bool) -> &str {
        let end = self.rest.find(|c| !belongs(c)).unwrap_or(self.rest.len());
        let (taken, rest) = self.rest.split_at(end);
        self.rest = rest;
        taken
    }

    fn sum(&mut self) -> Result<Operand<'a, O>> {
        self.depth += 1;
        ensure!(self.depth < DEEPEST, "it is nested too deeply");
        let mut left = self.product()?;
        loop {
            let sign = if self.take("+") {
                '+'
            } else if self.take("-") {
                '-'
            } else {
                self.depth -= 1;
                return Ok(left);
            };
            left = binary(left, sign, self.product()?)?;
        }
    }

    fn product(&mut self) -> Result<Operand<'a, O>> {
        let mut left = self.signed()?;
        loop {
            let sign = if self.take("//") {
                'f'
            } else if !self.rest.starts_with("**") && self.take("*") {
                '*'
            } else if self.take("/") {
                '/'
            } else if self.take("%") {
                '%'
            } else {
                return Ok(left);
            };
            left = binary(left, sign, self.signed()?)?;
        }
    }

    /// Parses a power with an optional sign: `-P**2` is `-(P**2)`, and the exponent may have a sign too, as in
    /// `P**-2`.
    fn signed(&mut self) -> Result<Operand<'a, O>> {
        if self.take("-") {
            return Ok(match self.signed()? {
                Operand::Number(number) => Operand::Number(-number),
                Operand::Metric(metric) => Operand::Metric(-metric),
            });
        }
        let base = self.called()?;
        if self.take("**") {
            let exponent = self.signed()?;
            return binary(base, '^', exponent);
        }
        Ok(base)
    }

    /// Parses an operand with the calls and indices behind it.
    fn called(&mut self) -> Result<Operand<'a, O>> {
        let mut value = self.atom()?;
        loop {
            if self.take("[") {
                let text = self.taken_while(|c| c == '-' || c.is_ascii_digit());
                let index: i64 = text.parse().with_context(|| format!("the index {text:?}"))?;
                self.expect("]")?;
                value = Operand::Metric(value.metric().index(index));
            } else if self.take(".") {
                let name = self.taken_while(|c| c == '_' || c.is_ascii_alphanumeric()).to_owned();
                self.expect("(")?;
                self.expect(")")?;
                let metric = value.metric();
                value = Operand::Metric(match name.as_str() {
                    "mean" => metric.mean(),
                    "sum" => metric.sum(),
                    "max" => metric.apply(|value| Ok(value.f_max()?)),
                    "min" => metric.apply(|value| Ok(value.f_min()?)),
                    "abs" => metric.apply(|value| Ok(value.f_abs()?)),
                    "sqrt" => metric.apply(|value| Ok(value.f_sqrt()?)),
                    "exp" => metric.apply(|value| Ok(value.f_exp()?)),
                    "log" => metric.apply(|value| Ok(value.f_log()?)),
                    other => bail!("no method {other}"),
                });
            } else {
                return Ok(value);
            }
        }
    }

    fn atom(&mut self) -> Result<Operand<'a, O>> {
        if self.take("(") {
            let inner = self.sum()?;
            self.expect(")")?;
            return Ok(inner);
        }
        for (name, metric) in &self.names {
            if let Some(rest) = self.rest.strip_prefix(name) {
                self.rest = rest;
                return Ok(Operand::Metric(metric.clone()));
            }
        }
        let at = self.rest;
        let text = self.taken_while(|c| c == '.' || c.is_ascii_digit());
        let number = text.parse().ok().with_context(|| format!("no operand at {at:?}"))?;
        Ok(Operand::Number(number))
    }
}

fn binary<'a, O>(
    left: Operand<'a, O>,
    sign: char,
    right: Operand<'a, O>,
) -> Result<Operand<'a, O>> {
    if let (Operand::Number(a), Operand::Number(b)) = (&left, &right) {
        return Ok(Operand::Number(match sign {
            '+' => a + b,
            '-' => a - b,
            '*' => a * b,
            '/' => a / b,
            'f' => ((a - remainder(*a, *b)) / b).round(),
            '%' => remainder(*a, *b),
            '^' => a.powf(*b),
            other => bail!("no operator {other}"),
        }));
    }
    let (a, b) = (left.metric(), right.metric());
    Ok(Operand::Metric(match sign {
        '+' => a + b,
        '-' => a - b,
        '*' => a * b,
        '/' => a / b,
        'f' => a.floor_divide(b),
        '%' => a % b,
        '^' => a.pow(b),
        other => bail!("no operator {other}"),
    }))
}

/// Python's `%` of floats; the result has the sign of the divisor.
fn remainder(a: f64, b: f64) -> f64 {
    let remainder = a % b;
    if remainder != 0. && (remainder < 0.) != (b < 0.) { remainder + b } else { remainder }
}
