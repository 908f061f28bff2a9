//! Several processes at one run.
//!
//! Every process, a *rank*, holds a share of the samples with both streams, and all take the same
//! steps. They meet in one operation, [`Communicator::all_to_all`], which everything else here is
//! made of: there is no sum in it, so whoever carries the bytes has no part in the result. What is
//! summed over samples is summed in *shards* ([`crate::shards`]), and these in their order, by the
//! pipeline: results depend on the number of shards, never on the number of ranks.
//!
//! Whoever can carry bytes can be a communicator: [`Alone`] for one process, [`Local`] for threads of
//! one, [`Tcp`] between machines, and MPI with the feature `mpi`.

mod local;
pub(crate) mod message;
#[cfg(feature = "mpi")]
mod mpi;
mod tcp;

pub use local::Local;
#[cfg(feature = "mpi")]
pub use mpi::Mpi;
pub use tcp::{Rendezvous, Tcp};

use crate::{Error, Result};
use message::{Message, Received};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// The other ranks of a run. All ranks call the same operations in the same order.
pub trait Communicator: Send + Sync {
    /// This one's place, from 0.
    fn rank(&self) -> usize;

    /// How many there are.
    fn n_ranks(&self) -> usize;

    /// Sends `outgoing[to]` to each rank and gives what each sent here, by rank; nothing goes to
    /// oneself, and what is there for oneself stays unread.
    ///
    /// # Errors
    /// [`crate::Error::RankLost`], [`crate::Error::Rank`] if a rank has ended the run.
    fn all_to_all(&self, outgoing: &[&[u8]]) -> Result<Vec<Vec<u8>>>;

    /// Ends the run at all other ranks, and tells them why: an error of this rank, or what it knows of
    /// another.
    fn abort(&self, error: &Error);

    /// What this rank has sent so far, and the time it took.
    fn traffic(&self) -> Traffic;
}

/// What went from a rank to others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes, those of the carrier's own frames aside.
    pub bytes_sent: u64,
    /// The time in [`Communicator::all_to_all`], that of waiting for slower ranks included.
    pub time: Duration,
}

impl dyn Communicator + '_ {
    /// Whether there is nobody else.
    pub fn is_alone(&self) -> bool {
        self.n_ranks() == 1
    }

    /// Everybody's bytes, by rank, one's own among them.
    ///
    /// # Errors
    /// As [`Communicator::all_to_all`].
    pub fn all_gather(&self, own: Vec<u8>) -> Result<Vec<Vec<u8>>> {
        let mut all = match self.is_alone() {
            true => vec![Vec::new()],
            false => self.all_to_all(&vec![&own[..]; self.n_ranks()])?,
        };
        all[self.rank()] = own;
        Ok(all)
    }

    /// Rank 0's bytes at every rank; `own` is looked at there only.
    ///
    /// # Errors
    /// As [`Communicator::all_to_all`].
    pub fn broadcast(&self, own: Vec<u8>) -> Result<Vec<u8>> {
        if self.rank() == 0 {
            if !self.is_alone() {
                self.all_to_all(&vec![&own[..]; self.n_ranks()])?;
            }
            return Ok(own);
        }
        let mut all = self.all_to_all(&vec![&[][..]; self.n_ranks()])?;
        Ok(all.swap_remove(0))
    }

    /// `all_gather` of a value.
    ///
    /// # Errors
    /// As there; [`crate::Error::Rank`] if a rank sends another kind of value.
    pub fn all_gather_value<T: Serialize + DeserializeOwned>(&self, own: &T) -> Result<Vec<T>> {
        let all = self.all_gather(Message::new(own).into_bytes())?;
        let all = all.iter().enumerate();
        all.map(|(rank, bytes)| Received::only(rank, bytes))
            .collect()
    }

    /// Rank 0's value at every rank; `own` is made there only.
    ///
    /// # Errors
    /// As `all_gather_value`; those of `own`.
    pub fn broadcast_value<T: Serialize + DeserializeOwned>(
        &self,
        own: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        if self.rank() == 0 {
            let own = own()?;
            self.broadcast(Message::new(&own).into_bytes())?;
            return Ok(own);
        }
        Received::only(0, &self.broadcast(Vec::new())?)
    }
}

/// The only rank of a run.
#[derive(Clone, Copy, Debug, Default)]
pub struct Alone;

impl Communicator for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn n_ranks(&self) -> usize {
        1
    }

    fn all_to_all(&self, _: &[&[u8]]) -> Result<Vec<Vec<u8>>> {
        Ok(vec![Vec::new()])
    }

    fn abort(&self, _: &Error) {}

    fn traffic(&self) -> Traffic {
        Traffic::default()
    }
}

/// Counts what a rank sends.
#[derive(Debug, Default)]
struct Meter(Mutex<Traffic>);

impl Meter {
    /// Counts what goes to others than `rank`, and the time that it takes.
    fn measure<T>(&self, rank: usize, outgoing: &[&[u8]], exchange: impl FnOnce() -> T) -> T {
        let began = Instant::now();
        let done = exchange();
        let others = outgoing.iter().enumerate().filter(|(to, _)| *to != rank);
        let mut traffic = self.0.lock().unwrap_or_else(|e| e.into_inner());
        traffic.bytes_sent += others.map(|(_, bytes)| bytes.len() as u64).sum::<u64>();
        traffic.time += began.elapsed();
        done
    }

    fn total(&self) -> Traffic {
        *self.0.lock().unwrap_or_else(|e| e.into_inner())
    }
}

#[cfg(test)]
mod tests;
