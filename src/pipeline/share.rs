//! What a rank of a team makes of its rows, on its way to all ranks.

use crate::distributed::Communicator;
use crate::distributed::message::{Message, Received};
use crate::pack::{pack, unpack, words_for};
use crate::plan::Scheme;
use crate::report::{Deviation, ModuleReport};
use crate::statistics::InputSquares;
use crate::{Matrix, QuantizedWeight, Result};
use serde::{Deserialize, Serialize};

/// Some rows of a solved linear, or all.
pub(super) struct Share {
    pub(super) told: Told,
    pub(super) weight: QuantizedWeight,
}

/// What is told of a share beside its weight.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Told {
    /// Place of the linear's group among those that are solved at once.
    pub(super) group: usize,
    /// Its losses are of these rows alone.
    pub(super) report: ModuleReport,
    /// What `report.loss` is to be compared with.
    pub(super) energy: f64,
    /// The same at all ranks of a team.
    pub(super) deviations: Vec<Deviation>,
    /// Of the group's first linear.
    pub(super) squares: Option<InputSquares>,
}

/// How a weight's numbers follow.
#[derive(Serialize, Deserialize)]
pub(super) struct Form {
    scheme: Scheme,
    shape: [usize; 2],
}

impl Form {
    pub(super) fn of(weight: &QuantizedWeight) -> Self {
        Self {
            scheme: weight.scheme(),
            shape: [weight.rows(), weight.cols()],
        }
    }

    pub(super) fn put(message: &mut Message, weight: &QuantizedWeight) {
        message.words(&pack(weight.codes(), weight.scheme().bits()));
        message.bytes(weight.zero_points());
        message.f32s(weight.scales().data());
    }

    /// # Errors
    /// [`crate::Error::Rank`] for a message that is too short, those of [`QuantizedWeight::new`] for
    /// numbers that are no weight.
    pub(super) fn take(&self, module: &str, rest: &mut Received<'_>) -> Result<QuantizedWeight> {
        let [rows, cols] = self.shape;
        let bits = self.scheme.bits();
        let n_codes = rows.checked_mul(cols);
        let n_words = n_codes.and_then(|n| words_for(n, bits));
        let (n_codes, n_words) = n_codes
            .zip(n_words)
            .ok_or_else(|| rest.error("a shape beyond all bounds"))?;
        let codes = unpack(&rest.words(n_words)?, bits, n_codes).codes;
        let n_groups = cols / self.scheme.group_len(module, cols)?;
        let zero_points = rest.bytes(rows * n_groups)?.to_vec();
        let scales = Matrix::from_vec(module, rows, n_groups, rest.f32s(rows * n_groups)?)?;
        QuantizedWeight::new(module, self.scheme, self.shape, codes, scales, zero_points)
    }
}

/// The linears of some groups, put together of what all ranks made of their rows; in the order of
/// groups and linears, which every rank has them in.
///
/// # Errors
/// [`crate::Error::Rank`]; those of [`QuantizedWeight::new`].
pub(super) fn together(own: Vec<Share>, communicator: &dyn Communicator) -> Result<Vec<Share>> {
    if communicator.is_alone() {
        return Ok(own);
    }
    let headers: Vec<(Told, Form)> = own
        .iter()
        .map(|share| (share.told.clone(), Form::of(&share.weight)))
        .collect();
    let mut message = Message::new(&headers);
    own.iter()
        .for_each(|share| Form::put(&mut message, &share.weight));
    drop(own);
    let received = communicator.all_gather(message.into_bytes())?;
    let mut shares: Vec<Share> = Vec::new();
    for (rank, bytes) in received.iter().enumerate() {
        let (headers, mut rest): (Vec<(Told, Form)>, _) = Received::open(rank, bytes)?;
        for (told, form) in headers {
            let weight = form.take(&told.report.name, &mut rest)?;
            shares.push(Share { told, weight });
        }
        rest.end()?;
    }
    drop(received);
    // Teams are of consecutive ranks, and each has its linears in order: so are the rows of each.
    shares.sort_by_key(|share| share.told.group);
    let mut linears: Vec<Vec<Share>> = Vec::new();
    for share in shares {
        let name = &share.told.report.name;
        let same = linears
            .iter_mut()
            .find(|rows| rows[0].told.report.name == *name);
        match same {
            Some(rows) => rows.push(share),
            None => linears.push(vec![share]),
        }
    }
    linears.into_iter().map(joined).collect()
}

/// A linear of its rows.
fn joined(mut rows: Vec<Share>) -> Result<Share> {
    if rows.len() == 1 {
        return Ok(rows.remove(0));
    }
    let mut told = rows[0].told.clone();
    let sum = |of: fn(&ModuleReport) -> Option<f64>| {
        let losses = rows.iter().map(|share| of(&share.told.report));
        losses.sum::<Option<f64>>()
    };
    let n_rows: usize = rows.iter().map(|share| share.weight.rows()).sum();
    let mean = |of: fn(&ModuleReport) -> Option<f64>| {
        let weighted = rows.iter().map(|share| {
            let own = share.weight.rows() as f64 / n_rows as f64;
            of(&share.told.report).map(|value| value * own)
        });
        weighted.sum::<Option<f64>>()
    };
    told.energy = rows.iter().map(|share| share.told.energy).sum();
    told.report.loss = sum(|report| report.loss);
    told.report.nearest_loss = sum(|report| report.nearest_loss);
    told.report.alpha = mean(|report| report.alpha);
    let name = &told.report.name;
    let first = &rows[0].weight;
    let (scheme, cols, n_groups) = (first.scheme(), first.cols(), first.n_groups());
    let codes = rows.iter().flat_map(|share| share.weight.codes()).copied();
    let zeros = rows.iter().flat_map(|share| share.weight.zero_points());
    let scales = rows.iter().flat_map(|share| share.weight.scales().data());
    let scales = Matrix::from_vec(name, n_rows, n_groups, scales.copied().collect())?;
    let weight = QuantizedWeight::new(
        name,
        scheme,
        [n_rows, cols],
        codes.collect(),
        scales,
        zeros.copied().collect(),
    )?;
    Ok(Share { told, weight })
}
