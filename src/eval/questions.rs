//! The questions of a task, read as they are asked for.

use super::MAX_ANSWER_TOKENS;
use super::benchmark::{Asked, Benchmark};
use super::metric::Protocol;
use super::task::TaskRows;
use crate::dataset::{Row, read_rows};
use crate::{Error, Result};
use std::path::PathBuf;

/// Questions that are encoded, answered and written down together: as many images are in memory.
/// A run that goes on after a stop begins at a multiple of it, since questions on one image are
/// read together.
pub const QUESTIONS_AT_ONCE: usize = 16;

/// Where questions come from, and how they are put.
#[derive(Clone, Debug)]
pub struct QuestionSource {
    /// File, or folder of files that are one set.
    pub path: PathBuf,
    /// The set; absent for questions that stand as they are.
    pub benchmark: Option<Benchmark>,
    /// Whose prompts and rules.
    pub protocol: Protocol,
    /// Which of them.
    pub rows: TaskRows,
    /// Longest answer, in tokens, in place of the set's own.
    pub max_new_tokens: Option<usize>,
}

impl QuestionSource {
    /// Whether the first row is raw text.
    ///
    /// # Errors
    /// As [`read_rows`].
    pub fn is_text(&self) -> Result<bool> {
        let first = read_rows(&self.path)?.next().transpose()?;
        Ok(self.benchmark.is_none() && first.is_some_and(|row| row.is_text()))
    }

    /// The questions in file order.
    ///
    /// # Errors
    /// As [`read_rows`], [`Benchmark::asked`] and [`Asked::plainly`].
    pub fn questions(&self) -> Result<impl Iterator<Item = Result<Asked>> + Send> {
        let source = self.clone();
        let asked = read_rows(&self.path)?
            .map(move |row| source.asked(row?))
            .filter_map(Result::transpose);
        let (mut n_to_skip, limit) = (self.rows.skip, self.rows.limit.unwrap_or(usize::MAX));
        // An error is never skipped: nothing comes after it.
        let is_taken = move |asked: &Result<Asked>| {
            let is_skipped = n_to_skip > 0 && asked.is_ok();
            n_to_skip -= usize::from(is_skipped);
            !is_skipped
        };
        Ok(asked.filter(is_taken).take(limit))
    }

    fn asked(&self, row: Row) -> Result<Option<Asked>> {
        let mut asked = match self.benchmark {
            Some(benchmark) => benchmark.asked(row, self.protocol)?,
            None => Some(Asked::plainly(row, MAX_ANSWER_TOKENS)?),
        };
        if let (Some(asked), Some(n)) = (&mut asked, self.max_new_tokens) {
            asked.max_new_tokens = n;
        }
        Ok(asked)
    }

    /// Number of questions, all of whose rows have been looked at, images aside.
    ///
    /// # Errors
    /// As [`QuestionSource::questions`] for the first row that is not sound; [`Error::Missing`] if
    /// there is no question.
    pub fn count(&self) -> Result<usize> {
        let mut n = 0;
        for asked in self.questions()? {
            asked?;
            n += 1;
        }
        if n == 0 && self.rows.skip == 0 && self.rows.limit != Some(0) {
            return Err(Error::Missing {
                what: "questions (the set is empty)".into(),
                place: self.path.display().to_string(),
            });
        }
        Ok(n)
    }
}
