//! Sums over shards on their way to those who solve with them.
//!
//! Alone, a shard's sums are added to those of the shards before it. Among several ranks each adds
//! up one *band* of the moments, for all: in every round each has the sums of a shard and sends each
//! band to whom it belongs, who adds them in the order of shards; at the end bands go to the ranks
//! that solve. Both add the same numbers in the same order. Every rank sends (N − 1)/N of the moments
//! in a round and 1/N of them to each who solves, which is the least that can be sent for one shard
//! a rank, but for the band of the solving rank itself.
//! Counts of tokens, which are few, are kept by all.

use super::inputs::{Shared, Summed, Summing, WeightShare};
use crate::Result;
use crate::distributed::Communicator;
use crate::distributed::message::{Message, Received};
use crate::statistics::bands::{Counts, band_range};
use serde::{Deserialize, Serialize};

/// The sums of some groups.
pub(super) struct Reduction<'a> {
    communicator: &'a dyn Communicator,
    shared: &'a [Shared],
    summing: Summing,
    totals: Vec<Total>,
}

/// What is there of a group's sums.
enum Total {
    Nothing,
    /// All of it, where there is one rank.
    Whole(Summed),
    /// This rank's band.
    Band(Band),
}

struct Band {
    tally: Tally,
    moments: Vec<f32>,
    /// Of the part, where one is kept apart.
    part: Option<Vec<f32>>,
}

/// What is counted beside moments.
#[derive(Clone, Serialize, Deserialize)]
struct Tally {
    counts: Counts,
    part: Option<Counts>,
    share: Option<WeightShare>,
}

impl Tally {
    fn of(summed: &Summed) -> Self {
        Self {
            counts: summed.statistics.counts(),
            part: summed.part.as_ref().map(|part| part.counts()),
            share: summed.weight_share.clone(),
        }
    }

    fn add(&mut self, other: &Self) {
        self.counts.add(other.counts);
        if let (Some(own), Some(other)) = (&mut self.part, other.part) {
            own.add(other);
        }
        if let (Some(own), Some(other)) = (&mut self.share, &other.share) {
            own.merge(other);
        }
    }
}

impl<'a> Reduction<'a> {
    pub(super) fn new(
        communicator: &'a dyn Communicator,
        shared: &'a [Shared],
        summing: Summing,
    ) -> Self {
        Self {
            communicator,
            shared,
            summing,
            totals: shared.iter().map(|_| Total::Nothing).collect(),
        }
    }

    /// Adds a round's shards: this rank's own, where it has one, and the others'.
    pub(super) fn add(&mut self, own: Option<Vec<Summed>>) -> Result<()> {
        let mut own = own.into_iter().flatten();
        for (group, total) in self.totals.iter_mut().enumerate() {
            let own = own.next();
            match self.communicator.is_alone() {
                true => total.add(own)?,
                false => {
                    let kind = (&self.shared[group], self.summing);
                    total.add_band(self.communicator, own, kind)?;
                }
            }
        }
        Ok(())
    }

    /// The groups' sums at each rank of their team, the part's among the whole.
    pub(super) fn finish(self, teams: &[Vec<usize>]) -> Result<Vec<Option<Summed>>> {
        let groups = self.totals.into_iter().zip(self.shared).zip(teams);
        let done = groups.map(|((total, group), team)| match total {
            Total::Whole(summed) => summed.complete().map(Some),
            Total::Nothing => Ok(Some(group.empty(self.summing))),
            Total::Band(band) => band.for_team(self.communicator, (group, self.summing), team),
        });
        done.collect()
    }
}

impl Total {
    fn add(&mut self, own: Option<Summed>) -> Result<()> {
        match (&mut *self, own) {
            (_, None) => Ok(()),
            (Self::Whole(sum), Some(own)) => sum.merge(&own),
            (_, Some(own)) => {
                *self = Self::Whole(own);
                Ok(())
            }
        }
    }

    fn add_band(
        &mut self,
        communicator: &dyn Communicator,
        own: Option<Summed>,
        kind: (&Shared, Summing),
    ) -> Result<()> {
        let n_ranks = communicator.n_ranks();
        let message = |own: &Summed, rank: usize| {
            let mut message = Message::new(&Tally::of(own));
            message.f32s(&own.statistics.band(rank, n_ranks));
            if let Some(part) = &own.part {
                message.f32s(&part.band(rank, n_ranks));
            }
            message.into_bytes()
        };
        let outgoing = (0..n_ranks).map(|rank| match &own {
            Some(own) => message(own, rank),
            None => Vec::new(),
        });
        let outgoing: Vec<Vec<u8>> = outgoing.collect();
        drop(own);
        let slices: Vec<&[u8]> = outgoing.iter().map(Vec::as_slice).collect();
        let mut received = communicator.all_to_all(&slices)?;
        received[communicator.rank()] = outgoing[communicator.rank()].clone();
        let n_moments = kind.0.n_moments(kind.1);
        let n = band_range(n_moments, communicator.rank(), n_ranks).len();
        for (rank, bytes) in received.iter().enumerate().filter(|(_, b)| !b.is_empty()) {
            self.take(Band::read(rank, bytes, n)?);
        }
        Ok(())
    }

    /// Adds the next shard's band.
    fn take(&mut self, next: Band) {
        let Self::Band(sum) = self else {
            *self = Self::Band(next);
            return;
        };
        sum.tally.add(&next.tally);
        add(&mut sum.moments, &next.moments);
        if let (Some(sum), Some(next)) = (&mut sum.part, &next.part) {
            add(sum, next);
        }
    }
}

impl Band {
    fn read(rank: usize, bytes: &[u8], n: usize) -> Result<Self> {
        let (tally, mut rest): (Tally, _) = Received::open(rank, bytes)?;
        let band = Self {
            moments: rest.f32s(n)?,
            part: tally.part.map(|_| rest.f32s(n)).transpose()?,
            tally,
        };
        rest.end()?;
        Ok(band)
    }

    /// Brings all bands to each of `team`.
    fn for_team(
        mut self,
        communicator: &dyn Communicator,
        (group, summing): (&Shared, Summing),
        team: &[usize],
    ) -> Result<Option<Summed>> {
        if let Some(part) = &self.part {
            add(&mut self.moments, part);
        }
        let mut message = Message::new(&());
        message.f32s(&self.moments);
        self.part.iter().for_each(|part| message.f32s(part));
        let message = message.into_bytes();
        let (own, n_ranks) = (communicator.rank(), communicator.n_ranks());
        let to = |rank: usize| match team.contains(&rank) {
            true => &message[..],
            false => &[],
        };
        let outgoing: Vec<&[u8]> = (0..n_ranks).map(to).collect();
        let mut received = communicator.all_to_all(&outgoing)?;
        if !team.contains(&own) {
            return Ok(None);
        }
        received[own] = message;
        let n_moments = group.n_moments(summing);
        let (mut whole, mut parts) = (Vec::new(), Vec::new());
        // Each message goes as its numbers come.
        for (rank, bytes) in received.into_iter().enumerate() {
            let n = band_range(n_moments, rank, n_ranks).len();
            let ((), mut rest) = Received::open(rank, &bytes)?;
            whole.push(rest.f32s(n)?);
            if self.part.is_some() {
                parts.push(rest.f32s(n)?);
            }
            rest.end()?;
        }
        let empty = group.empty(summing);
        let mut counts = self.tally.counts;
        self.tally
            .part
            .into_iter()
            .for_each(|part| counts.add(part));
        let part = empty.part.zip(self.tally.part);
        Ok(Some(Summed {
            statistics: empty.statistics.filled(counts, &whole)?,
            part: part
                .map(|(part, counts)| part.filled(counts, &parts))
                .transpose()?,
            weight_share: self.tally.share,
        }))
    }
}

fn add(sum: &mut [f32], next: &[f32]) {
    sum.iter_mut()
        .zip(next)
        .for_each(|(sum, next)| *sum += next);
}
