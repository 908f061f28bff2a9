//! Ranks that MPI starts and connects.
//!
//! MPI carries the bytes and nothing else: none of its reductions is used, whose order of sums is
//! nobody's promise. A rank that is lost is noticed by whoever started the ranks, which ends them all.

use super::{Communicator, Meter, Traffic};
use crate::{Error, Result};
use mpi::Threading;
use mpi::environment::Universe;
use mpi::request::multiple_scope;
use mpi::topology::SimpleCommunicator;
use mpi::traits::{Communicator as _, CommunicatorCollectives, Destination, Source};
use std::sync::{Mutex, MutexGuard};

/// Bytes of one message: counts are 32-bit numbers.
const PIECE: usize = 1 << 30;

/// What a rank that ends the run leaves as its exit code.
const EXIT_CODE: i32 = 2;

/// A rank of the program that `mpirun` or `srun` started.
pub struct Mpi {
    rank: usize,
    n_ranks: usize,
    world: Mutex<World>,
    meter: Meter,
}

struct World {
    communicator: SimpleCommunicator,
    /// Ends MPI when it goes.
    _universe: Universe,
}

// SAFETY: a handle of MPI belongs to the process, not to a thread. `Mpi::start` makes sure that the
// library lets any thread call it, one at a time, and the lock around it sees to that.
unsafe impl Send for World {}

impl Mpi {
    /// Joins the other ranks.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the library does not let several threads call it in turns, or was
    /// started before.
    pub fn start() -> Result<Self> {
        let unsupported = |what: &str| Error::Unsupported { what: what.into() };
        let started = mpi::initialize_with_threading(Threading::Serialized);
        let (universe, threading) =
            started.ok_or_else(|| unsupported("starting MPI twice in a process"))?;
        if threading < Threading::Serialized {
            return Err(unsupported(
                "an MPI library without MPI_THREAD_SERIALIZED; use one that was built with it",
            ));
        }
        let communicator = universe.world();
        let to_count = |n: i32| usize::try_from(n).expect("MPI counts ranks from 0");
        Ok(Self {
            rank: to_count(communicator.rank()),
            n_ranks: to_count(communicator.size()),
            world: Mutex::new(World {
                communicator,
                _universe: universe,
            }),
            meter: Meter::default(),
        })
    }

    fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl Mpi {
    fn exchange(&self, outgoing: &[&[u8]]) -> Result<Vec<Vec<u8>>> {
        let world = self.world();
        let world = &world.communicator;
        let mut lengths: Vec<u64> = outgoing.iter().map(|bytes| bytes.len() as u64).collect();
        lengths[self.rank] = 0;
        let mut to_come = vec![0u64; self.n_ranks];
        world.all_to_all_into(&lengths[..], &mut to_come[..]);
        let mut received: Vec<Vec<u8>> = to_come.iter().map(|n| vec![0; *n as usize]).collect();
        let n_pieces = |n: &u64| n.div_ceil(PIECE as u64) as usize;
        let n_requests = lengths.iter().chain(&to_come).map(n_pieces).sum();
        multiple_scope(n_requests, |scope, requests| {
            for (from, bytes) in received.iter_mut().enumerate() {
                let process = world.process_at_rank(from as i32);
                for piece in bytes.chunks_mut(PIECE) {
                    requests.add(process.immediate_receive_into(scope, piece));
                }
            }
            for (to, bytes) in outgoing
                .iter()
                .enumerate()
                .filter(|(to, _)| *to != self.rank)
            {
                let process = world.process_at_rank(to as i32);
                for piece in bytes.chunks(PIECE) {
                    requests.add(process.immediate_send(scope, piece));
                }
            }
            let mut done = Vec::with_capacity(n_requests);
            requests.wait_all(&mut done);
        });
        Ok(received)
    }
}

impl Communicator for Mpi {
    fn rank(&self) -> usize {
        self.rank
    }

    fn n_ranks(&self) -> usize {
        self.n_ranks
    }

    fn all_to_all(&self, outgoing: &[&[u8]]) -> Result<Vec<Vec<u8>>> {
        self.meter
            .measure(self.rank, outgoing, || self.exchange(outgoing))
    }

    fn abort(&self, _: &Error) {
        self.world().communicator.abort(EXIT_CODE);
    }

    fn traffic(&self) -> Traffic {
        self.meter.total()
    }
}
