//! Multiple choice by the first token: which option's letter a model finds most likely to begin its
//! answer with. It needs one reading of the prompt and depends on no wording of the answer, and is a
//! measure of its own, told beside the benchmark's.

use crate::Result;
use crate::processor::Processor;
use serde::{Deserialize, Serialize};

/// The letter of an option, and the token that an answer with it begins with.
pub type LetterToken = (char, u32);

/// What a model would answer if it had only the letters to choose from.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct FirstToken {
    /// The likeliest letter; the first one among equals.
    pub letter: char,
    /// How likely it is among the letters.
    pub probability: f64,
}

impl FirstToken {
    /// From the logits of the letters' tokens; `None` without letters.
    pub fn of(letters: &[LetterToken], logits: &[f32]) -> Option<Self> {
        let pairs = letters.iter().zip(logits);
        let (letter, highest) = pairs
            .map(|((letter, _), logit)| (*letter, *logit))
            .reduce(|best, next| if next.1 > best.1 { next } else { best })?;
        let sum: f64 = logits.iter().map(|l| f64::from(l - highest).exp()).sum();
        Some(Self {
            letter,
            probability: 1.0 / sum,
        })
    }
}

/// The tokens that answers with these letters begin with; none if the tokenizer lets two letters begin
/// alike, so that the first token tells nothing.
///
/// # Errors
/// The tokenizer's.
pub fn letter_tokens(processor: &Processor, letters: &[char]) -> Result<Vec<LetterToken>> {
    let mut found: Vec<LetterToken> = Vec::with_capacity(letters.len());
    for letter in letters {
        let ids = processor.encode_continuation(&letter.to_string())?;
        let id = ids.first().copied();
        match id.filter(|id| found.iter().all(|(_, other)| other != id)) {
            Some(id) => found.push((*letter, id)),
            None => return Ok(Vec::new()),
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_likeliest_letter_has_its_share_among_the_letters() {
        let letters = [('A', 5), ('B', 9), ('C', 7)];
        let found = FirstToken::of(&letters, &[1.0, 3.0, 1.0]).unwrap();
        assert_eq!(found.letter, 'B');
        let expected = 1.0 / (1.0 + 2.0 * f64::exp(-2.0));
        assert!((found.probability - expected).abs() < 1e-12);
        let alike = FirstToken::of(&letters, &[2.0; 3]).unwrap();
        assert_eq!(alike.letter, 'A');
        assert!(FirstToken::of(&[], &[]).is_none());
    }
}
