//! A text as numbers, and windows of it.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use tch::{Device, Tensor};

/// The characters of the text in order, and the text as their numbers.
pub struct Text {
    pub characters: Vec<char>,
    pub tokens: Vec<i64>,
}

impl Text {
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| {
            format!("no text in {} (run scripts/fetch-text.sh)", path.display())
        })?;
        let mut characters: Vec<char> = text.chars().collect();
        characters.sort_unstable();
        characters.dedup();
        let number = |c| characters.binary_search(&c).map(|number| number as i64);
        let tokens = text.chars().filter_map(|c| number(c).ok()).collect();
        Ok(Self { characters, tokens })
    }

    pub fn decode(&self, tokens: &Tensor) -> Result<String> {
        let tokens = Vec::<i64>::try_from(tokens.flatten(0, -1))?;
        Ok(tokens.iter().filter_map(|token| self.characters.get(*token as usize)).collect())
    }
}

/// Inputs and targets: the windows of `tokens` that begin at every `step`th character, and the same one character later.
/// Both are views of one tensor.
pub fn windows(
    tokens: &[i64],
    context: i64,
    step: i64,
    device: Device,
) -> Result<(Tensor, Tensor)> {
    let text = Tensor::from_slice(tokens).to_device(device);
    let last = text.size()[0] - 1;
    ensure!(last >= context, "the text is too short for windows of {context} characters");
    let inputs = text.f_narrow(0, 0, last)?.f_unfold(0, context, step)?;
    Ok((inputs, text.f_narrow(0, 1, last)?.f_unfold(0, context, step)?))
}
