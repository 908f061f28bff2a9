//! The report as Markdown: the numbers without the pictures.

use super::{Content, environment};
use minijinja::value::{Serde, Value};
use minijinja::{AutoEscape, context};

pub(super) fn text(content: &Content) -> String {
    let mut environment = environment();
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.add_filter("md", |text: &str| escaped(text));
    environment.add_filter("code", |text: &str| code(text));
    let rendered = environment
        .template_from_named_str("report.md", include_str!("report.md"))
        .and_then(|template| {
            template.render(context! {
                pairs => content.summary.pairs().collect::<Vec<_>>(),
                ..Value::from(Serde(content))
            })
        });
    rendered.expect("the template is our own, and tests fill every part of it")
}

/// Text that Markdown and the HTML inside of it leave as it is, on one line.
fn escaped(text: &str) -> String {
    let mut escaped = String::new();
    for c in text.chars() {
        match c {
            '\n' | '\r' => escaped.push(' '),
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '\\' | '`' | '*' | '_' | '[' | ']' | '|' | '#' | '~' | '!' => {
                escaped.extend(['\\', c]);
            }
            c => escaped.push(c),
        }
    }
    escaped
}

/// Text in a fence longer than any run of backticks in it.
fn code(text: &str) -> String {
    let runs = text.split(|c| c != '`').map(str::len);
    let fence = "`".repeat(runs.max().unwrap_or(0).max(2) + 1);
    format!("{fence}\n{text}\n{fence}")
}
