//! Tables of layers × modules whose cells are coloured by their numbers.

use super::{percent, role};
use crate::report::{ModuleReport, RunReport};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};

/// Steps of colour.
const LEVELS: f64 = 9.0;

/// A table with a row for each layer and a column for each role.
#[derive(Debug, PartialEq, Serialize)]
pub(super) struct Map {
    columns: Vec<String>,
    rows: Vec<Row>,
    /// Whether any cell is marked.
    has_marks: bool,
}

#[derive(Debug, PartialEq, Serialize)]
struct Row {
    layer_idx: usize,
    cells: Vec<Option<Cell>>,
}

#[derive(Debug, PartialEq, Serialize)]
struct Cell {
    text: String,
    /// Step of colour, from 0.
    level: u8,
    /// Whether the number is one to look at.
    is_marked: bool,
}

/// A number, how it is written, and whether it is marked.
struct Entry {
    value: f64,
    text: String,
    is_marked: bool,
    /// The step of colour, where it does not follow from the other numbers.
    level: Option<u8>,
}

/// What is summed up of the modules with one role in one layer, of which a mixture has many.
#[derive(Default)]
struct Sums<'m> {
    modules: Vec<&'m ModuleReport>,
}

impl Sums<'_> {
    fn sum(&self, of: impl Fn(&ModuleReport) -> Option<f64>) -> Option<f64> {
        self.modules.iter().copied().map(of).sum()
    }

    fn least(&self, of: impl Fn(&ModuleReport) -> Option<f64>) -> Option<f64> {
        self.modules.iter().copied().filter_map(of).reduce(f64::min)
    }
}

/// The loss of each linear as a share of that of rounding to nearest; where that is not known, as a
/// share of its output.
pub(super) fn losses(report: &RunReport) -> Option<Map> {
    let known = |m: &ModuleReport| m.nearest_loss.is_some();
    let is_against_nearest = report.modules.iter().any(known);
    map(report, move |sums| {
        let loss = sums.sum(|m| m.loss)?;
        let whole = match is_against_nearest {
            true => sums.sum(|m| m.nearest_loss)?,
            false => sums.sum(energy)?,
        };
        let share = loss / whole.max(f64::MIN_POSITIVE);
        Some(Entry {
            value: share,
            text: percent(share),
            level: None,
            is_marked: is_against_nearest && share > 1.0,
        })
    })
}

/// The squared output that a loss is a share of.
pub(super) fn energy(module: &ModuleReport) -> Option<f64> {
    let relative = module.relative_loss.filter(|r| *r > 0.0)?;
    Some(module.loss? / relative)
}

/// Bits of the codes; of experts with different bits their mean.
pub(super) fn bits(report: &RunReport) -> Option<Map> {
    map(report, |sums| {
        let n = sums.modules.len() as f64;
        let bits = sums.sum(|m| m.scheme.map(|s| f64::from(s.bits())))? / n;
        Some(Entry {
            value: bits,
            text: match bits.fract() == 0.0 {
                true => format!("{bits:.0}"),
                false => format!("{bits:.1}"),
            },
            is_marked: false,
            // The same bits have the same colour in all reports.
            level: Some((2.0 * bits - 3.0).clamp(0.0, 8.0) as u8),
        })
    })
}

/// Effective sample sizes, of experts the least; marked where there are fewer tokens than inputs.
pub(super) fn sample_sizes(report: &RunReport) -> Option<Map> {
    map(report, |sums| {
        let size = sums.least(|m| m.effective_sample_size)?;
        let inputs = sums.least(|m| m.shape.map(|[_, inputs]| inputs as f64));
        Some(Entry {
            value: size.max(1.0).ln(),
            text: super::grouped(size.round() as u64),
            level: None,
            is_marked: inputs.is_some_and(|inputs| size < inputs),
        })
    })
}

/// The map of what `entry` tells; `None` if that is nothing for any module.
fn map(report: &RunReport, entry: impl Fn(&Sums) -> Option<Entry>) -> Option<Map> {
    let mut columns: Vec<String> = Vec::new();
    let mut sums: BTreeMap<(usize, String), Sums> = BTreeMap::new();
    for module in &report.modules {
        let role = role(&module.name);
        if !columns.contains(&role) {
            columns.push(role.clone());
        }
        let sums = sums.entry((module.layer_idx, role)).or_default();
        sums.modules.push(module);
    }
    let entries = sums
        .iter()
        .filter_map(|(key, sums)| Some((key, entry(sums)?)));
    let entries: BTreeMap<&(usize, String), Entry> = entries.collect();
    let least = entries
        .values()
        .min_by(|a, b| a.value.total_cmp(&b.value))?;
    let most = entries
        .values()
        .max_by(|a, b| a.value.total_cmp(&b.value))?;
    let level = |value: f64| {
        let span = (most.value - least.value).max(f64::MIN_POSITIVE);
        ((value - least.value) / span * LEVELS).min(LEVELS - 1.0) as u8
    };
    let cell = |layer_idx: usize, role: &String| {
        let entry = entries.get(&(layer_idx, role.clone()))?;
        Some(Cell {
            text: entry.text.clone(),
            level: entry.level.unwrap_or_else(|| level(entry.value)),
            is_marked: entry.is_marked,
        })
    };
    let layers: BTreeSet<usize> = report.modules.iter().map(|m| m.layer_idx).collect();
    let row = |layer_idx: usize| Row {
        layer_idx,
        cells: columns.iter().map(|role| cell(layer_idx, role)).collect(),
    };
    Some(Map {
        rows: layers.into_iter().map(row).collect(),
        has_marks: entries.values().any(|entry| entry.is_marked),
        columns,
    })
}
