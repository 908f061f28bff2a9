//! The report for people: one HTML page without anything outside of it, or Markdown.
//!
//! Numbers are made ready here, words and marks stand in the templates beside. Whatever comes from
//! files (names, tokens, questions, answers) is escaped by the template engine, and what the page's
//! script reads is JSON without `<`, `>`, `&` and `'`. The page says everything without its script
//! too, which only draws the pictures of another layer.

mod answers;
mod charts;
mod maps;
mod markdown;
mod pictures;
mod summary;

pub use answers::{Answers, Predictions};

use super::notes::Note;
use super::{Deviation, RunReport};
use crate::report::importance::ImportanceFile;
use answers::AnswerSection;
use charts::{LossChart, ShareChart};
use maps::Map;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, Value};
use minijinja::{AutoEscape, Environment, context};
use pictures::{Pictures, PicturesOrWhyNot};
use serde::Serialize;
use std::collections::BTreeMap;
use summary::Summary;

/// Name of the page in an output folder.
pub const PAGE_FILE: &str = "report.html";

/// What a page is made of.
pub struct Page<'p> {
    name: &'p str,
    report: &'p RunReport,
    importance: Option<&'p ImportanceFile>,
    answers: Option<&'p Answers>,
}

impl<'p> Page<'p> {
    /// The page of the folder `name`.
    pub fn new(
        name: &'p str,
        report: &'p RunReport,
        importance: Option<&'p ImportanceFile>,
    ) -> Self {
        Self {
            name,
            report,
            importance,
            answers: None,
        }
    }

    /// The same with what the model answered.
    #[must_use]
    pub fn with_answers(mut self, answers: &'p Answers) -> Self {
        self.answers = Some(answers);
        self
    }

    /// One page of HTML.
    pub fn html(&self) -> String {
        let mut environment = environment();
        environment.set_auto_escape_callback(|_| AutoEscape::Html);
        let pictures = Pictures::of(self.report, self.importance);
        let pictures = match &pictures {
            PicturesOrWhyNot::Pictures(pictures) => context! { of => Value::from(Serde(pictures)) },
            PicturesOrWhyNot::WhyNot(why) => context! { why_not => why },
        };
        let content = self.content();
        let rendered = environment
            .template_from_named_str("page.html", include_str!("page/page.html"))
            .and_then(|page| {
                page.render(context! {
                    style => include_str!("page/style.css"),
                    script => include_str!("page/script.js"),
                    pictures,
                    ..Value::from(Serde(&content))
                })
            });
        rendered.expect("the template is our own, and tests fill every part of it")
    }

    /// Markdown, for a README.
    pub fn markdown(&self) -> String {
        markdown::text(&self.content())
    }

    fn content(&self) -> Content<'_> {
        Content {
            name: self.name,
            report: self.report,
            summary: Summary::of(self.report),
            losses: maps::losses(self.report),
            loss_chart: LossChart::of(self.report),
            bits: maps::bits(self.report),
            sample_sizes: maps::sample_sizes(self.report),
            shares: ShareChart::all(self.report),
            fallbacks: fallbacks(&self.report.deviations),
            answers: self.answers.map(Answers::section),
        }
    }
}

/// An engine whose tags leave no lines of their own.
fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    let mut syntax = SyntaxConfig::builder();
    syntax.trim_blocks(true).lstrip_blocks(true);
    environment.set_syntax(syntax.build().expect("the marks are the usual ones"));
    environment
}

/// Everything that both forms of the report may tell.
#[derive(Serialize)]
struct Content<'c> {
    name: &'c str,
    report: &'c RunReport,
    summary: Summary,
    losses: Option<Map>,
    loss_chart: Option<LossChart>,
    bits: Option<Map>,
    sample_sizes: Option<Map>,
    shares: Vec<ShareChart>,
    fallbacks: Vec<Fallback>,
    answers: Option<AnswerSection>,
}

/// Deviations of one kind.
#[derive(Debug, PartialEq, Serialize)]
struct Fallback {
    title: &'static str,
    meaning: &'static str,
    /// Where, and what happened there.
    places: Vec<[String; 2]>,
}

fn fallbacks(deviations: &[Deviation]) -> Vec<Fallback> {
    let mut kinds: BTreeMap<&str, Fallback> = BTreeMap::new();
    for note in deviations.iter().map(Note::from) {
        let fallback = kinds.entry(note.title).or_insert(Fallback {
            title: note.title,
            meaning: note.meaning,
            places: Vec::new(),
        });
        fallback.places.push([note.place, note.what]);
    }
    kinds.into_values().collect()
}

/// The last words of a linear's name by which the layers' are told apart: `q` of
/// `model.layers.3.self_attn.q_proj`, `expert gate` of every expert's.
fn role(name: &str) -> String {
    let mut parts = name.rsplit('.');
    let last = parts.next().unwrap_or(name);
    let last = last.strip_suffix("_proj").unwrap_or(last);
    match parts.any(|part| part == "experts") {
        true => format!("expert {last}"),
        false => last.to_owned(),
    }
}

/// A share in percent, with a digit more where it is small.
fn percent(share: f64) -> String {
    match 100.0 * share {
        p if p.abs() >= 10.0 || p == 0.0 => format!("{p:.0} %"),
        p if p.abs() >= 1.0 => format!("{p:.1} %"),
        p => format!("{p:.2} %"),
    }
}

/// A whole number in groups of three digits.
fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push('\u{202f}');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests;
