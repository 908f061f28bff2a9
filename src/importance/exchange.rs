//! The factors of all samples, each made where its sample is.

use super::factors::{Drift, SampleFactors};
use crate::Result;
use crate::distributed::Communicator;
use crate::distributed::message::{Message, Received};
use crate::model::projection::Projection;
use crate::processor::TokenClass;
use serde::{Deserialize, Serialize};

/// What is told of a sample before its numbers: g of each role in turn, then its tokens' classes.
#[derive(Serialize, Deserialize)]
struct Header {
    /// Place among all samples.
    index: usize,
    /// By their places in [`Projection::ALL`].
    roles: Vec<usize>,
    n_tokens: usize,
    drift: Option<Drift>,
}

/// The factors of every sample of the run, in the order of samples, at every rank; `own` are those of
/// this one's samples, with their places among all.
///
/// # Errors
/// [`crate::Error::Rank`].
pub(crate) fn gather_factors(
    own: Vec<(usize, SampleFactors)>,
    communicator: &dyn Communicator,
) -> Result<Vec<SampleFactors>> {
    let mut all = match communicator.is_alone() {
        true => own,
        false => {
            let all = communicator.all_gather(message(&own))?;
            let all = all.iter().enumerate();
            let all = all.map(|(rank, bytes)| read(rank, bytes));
            all.collect::<Result<Vec<_>>>()?.concat()
        }
    };
    all.sort_by_key(|(index, _)| *index);
    Ok(all.into_iter().map(|(_, factors)| factors).collect())
}

fn message(own: &[(usize, SampleFactors)]) -> Vec<u8> {
    let headers: Vec<Header> = own
        .iter()
        .map(|(index, sample)| Header {
            index: *index,
            roles: sample.factors.iter().map(|(p, _)| *p as usize).collect(),
            n_tokens: sample.classes.len(),
            drift: sample.drift,
        })
        .collect();
    let mut message = Message::new(&headers);
    for (_, sample) in own {
        sample.factors.iter().for_each(|(_, g)| message.f32s(g));
        let classes: Vec<u8> = sample.classes.iter().map(|class| *class as u8).collect();
        message.bytes(&classes);
    }
    message.into_bytes()
}

fn read(rank: usize, bytes: &[u8]) -> Result<Vec<(usize, SampleFactors)>> {
    let (headers, mut rest): (Vec<Header>, _) = Received::open(rank, bytes)?;
    let mut all = Vec::with_capacity(headers.len());
    for header in headers {
        let mut factors = Vec::with_capacity(header.roles.len());
        for role in header.roles {
            let projection = Projection::ALL.get(role).copied();
            let projection = projection.ok_or_else(|| rest.error("an unknown role of a linear"))?;
            factors.push((projection, rest.f32s(header.n_tokens)?));
        }
        let classes = rest.bytes(header.n_tokens)?.iter();
        let classes = classes.map(|class| TokenClass::ALL.get(usize::from(*class)).copied());
        let classes: Option<Vec<TokenClass>> = classes.collect();
        let classes = classes.ok_or_else(|| rest.error("an unknown class of a token"))?;
        let sample = SampleFactors {
            factors,
            classes,
            drift: header.drift,
        };
        all.push((header.index, sample));
    }
    rest.end()?;
    Ok(all)
}
