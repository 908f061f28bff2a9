//! Raw text: no chat template, cut into pieces that a model reads one at a time.

use super::{ModelInput, Processor, TokenClass};
use crate::{Error, Result};

/// Tokens of raw text that are read at once, unless told otherwise.
pub const MAX_TEXT_TOKENS: usize = 2048;

impl Processor {
    /// The tokens of raw `text` in pieces of at most `max_tokens`.
    ///
    /// What each piece begins with is not to be predicted in it; all else is, so that every token
    /// of the text but the first stands in exactly one piece to be predicted. Pieces begin with the
    /// start token where the tokenizer puts one before a text, else with the last token of the
    /// piece before. Special tokens written in the text are read as such, as transformers does.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming `origin` for a text without tokens or with the image token in it,
    /// and for `max_tokens` below 2; [`Error::Format`] if the tokenizer fails.
    pub fn encode_pieces(
        &self,
        text: &str,
        origin: &str,
        max_tokens: usize,
    ) -> Result<Vec<ModelInput>> {
        if max_tokens < 2 {
            return Err(Error::Invalid {
                what: format!("--max-tokens {max_tokens}"),
                why: "2 or more expected: a token, and one to be predicted from it".into(),
            });
        }
        let encoding = self.tokenized(text, true)?;
        let class = |is_added: &u32| match is_added {
            0 => TokenClass::Text,
            _ => TokenClass::Special,
        };
        let classes: Vec<TokenClass> = encoding
            .get_special_tokens_mask()
            .iter()
            .map(class)
            .collect();
        let ids = encoding.get_ids();
        let invalid = |why: String| Error::Invalid {
            what: origin.to_owned(),
            why,
        };
        if !classes.contains(&TokenClass::Text) {
            return Err(invalid("a text with at least one token expected".into()));
        }
        if ids.contains(&self.image_token_id) {
            let token = self.images.image_token();
            return Err(invalid(format!("raw text holds the image token {token}")));
        }
        let pieces = piece_ranges(ids.len(), max_tokens);
        let pieces = pieces.map(|(before, tokens)| {
            let lead = match classes[0] {
                TokenClass::Special => 0,
                _ => before,
            };
            ModelInput {
                input_ids: [&ids[lead..=lead], &ids[tokens.clone()]].concat(),
                classes: [&classes[lead..=lead], &classes[tokens]].concat(),
                images: Vec::new(),
            }
        });
        Ok(pieces.collect())
    }
}

/// Runs of the tokens `1..n`, at most `max_tokens - 1` in each, and the token before each.
fn piece_ranges(
    n: usize,
    max_tokens: usize,
) -> impl Iterator<Item = (usize, std::ops::Range<usize>)> {
    let step = max_tokens - 1;
    let n_pieces = (n - 1).div_ceil(step).max(1);
    (0..n_pieces).map(move |i| (i * step, i * step + 1..((i + 1) * step + 1).min(n)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_but_the_first_is_in_one_piece() {
        for n in 1..20 {
            for max_tokens in 2..8 {
                let pieces: Vec<_> = piece_ranges(n, max_tokens).collect();
                let tokens: Vec<usize> = pieces.iter().flat_map(|(_, t)| t.clone()).collect();
                assert_eq!(tokens, (1..n).collect::<Vec<_>>(), "{n} {max_tokens}");
                for (before, tokens) in &pieces {
                    assert!(before + 1 == tokens.start && tokens.len() < max_tokens);
                }
            }
        }
    }
}
