use std::collections::HashMap;

use proptest::prelude::*;

use super::*;

const BLOCK: u64 = 4096;

fn claim(worker: usize, slot: u32, blocks: Range<u64>, access: Access) -> Claim {
    Claim { owner: Owner { worker, slot }, range: blocks.start * BLOCK..blocks.end * BLOCK, access }
}

fn owners(numbers: &[(usize, u32)]) -> Vec<Owner> {
    numbers.iter().map(|&(worker, slot)| Owner { worker, slot }).collect()
}

#[test]
fn changes_of_whole_blocks_go_side_by_side() {
    let locks = BlockLocks::new(2);
    for slot in 0..3 {
        assert!(locks.acquire(claim(0, slot, 0..4, Access::Shared)));
        assert!(locks.acquire(claim(1, slot, 2..6, Access::Shared)));
    }
    assert!(locks.release(Owner { worker: 0, slot: 1 }, Access::Shared).is_empty());
}

#[test]
fn who_changes_a_part_of_a_block_waits_for_all_others_of_all_workers() {
    let locks = BlockLocks::new(2);
    assert!(locks.acquire(claim(0, 0, 0..4, Access::Shared)));
    assert!(locks.acquire(claim(1, 0, 3..5, Access::Shared)));
    assert!(!locks.acquire(claim(1, 7, 3..4, Access::Alone)));
    assert!(locks.release(Owner { worker: 0, slot: 0 }, Access::Shared).is_empty());
    assert_eq!(locks.release(Owner { worker: 1, slot: 0 }, Access::Shared), owners(&[(1, 7)]));
}

#[test]
fn others_wait_for_who_changes_a_part_and_only_for_the_same_block() {
    let locks = BlockLocks::new(2);
    assert!(locks.acquire(claim(0, 0, 3..4, Access::Alone)));
    assert!(locks.acquire(claim(1, 0, 4..8, Access::Shared)), "beside it");
    assert!(locks.acquire(claim(1, 1, 2..3, Access::Alone)), "beside it");
    assert!(!locks.acquire(claim(1, 2, 0..4, Access::Shared)));
    assert!(!locks.acquire(claim(0, 1, 3..4, Access::Alone)));
    assert!(!locks.acquire(claim(1, 3, 3..9, Access::Shared)), "it does not overtake who waits");
    assert!(locks.release(Owner { worker: 1, slot: 1 }, Access::Alone).is_empty(), "still in the way");
    assert_eq!(locks.release(Owner { worker: 0, slot: 0 }, Access::Alone), owners(&[(1, 2)]));
    assert_eq!(locks.release(Owner { worker: 1, slot: 2 }, Access::Shared), owners(&[(0, 1)]));
    assert_eq!(locks.release(Owner { worker: 0, slot: 1 }, Access::Alone), owners(&[(1, 3)]));
}

#[test]
fn several_that_waited_for_the_same_have_their_blocks_together() {
    let locks = BlockLocks::new(1);
    assert!(locks.acquire(claim(0, 0, 0..u64::MAX / BLOCK, Access::Alone)), "the whole disk");
    assert!(!locks.acquire(claim(0, 1, 0..2, Access::Shared)));
    assert!(!locks.acquire(claim(0, 2, 1..3, Access::Shared)));
    assert!(!locks.acquire(claim(0, 3, 7..8, Access::Alone)));
    assert_eq!(locks.release(Owner { worker: 0, slot: 0 }, Access::Alone), owners(&[(0, 1), (0, 2), (0, 3)]));
}

/// What was granted and not released, to check each grant against.
#[derive(Default)]
struct Granted(HashMap<(usize, u32), (Range<u64>, Access)>);

impl Granted {
    fn add(&mut self, claim: &Claim) {
        for (range, access) in self.0.values() {
            let is_alone = *access == Access::Alone || claim.access == Access::Alone;
            assert!(!is_alone || !overlap(range, &claim.range), "{claim:?} beside {range:?} {access:?}");
        }
        self.0.insert((claim.owner.worker, claim.owner.slot), (claim.range.clone(), claim.access));
    }
}

proptest! {
    /// Whatever comes and goes in whatever order: what is granted is compatible, and nothing is left waiting.
    #[test]
    fn grants_are_compatible_and_each_claim_is_granted_at_last(
        steps in proptest::collection::vec((0..3_usize, 0..12_u64, 1..4_u64, any::<bool>(), 0..100_usize), 1..200)
    ) {
        let locks = BlockLocks::new(3);
        let (mut granted, mut waiting) = (Granted::default(), HashMap::new());
        let release = |granted: &mut Granted, waiting: &mut HashMap<(usize, u32), Claim>, number: usize| {
            let mut keys: Vec<_> = granted.0.keys().copied().collect();
            keys.sort_unstable();
            let Some(&(worker, slot)) = keys.get(number % keys.len().max(1)) else { return };
            let (_, access) = granted.0.remove(&(worker, slot)).unwrap();
            for owner in locks.release(Owner { worker, slot }, access) {
                granted.add(&waiting.remove(&(owner.worker, owner.slot)).expect("it waited"));
            }
        };
        for (slot, (worker, first, blocks, is_alone, number)) in steps.into_iter().enumerate() {
            let access = if is_alone { Access::Alone } else { Access::Shared };
            let claim = claim(worker, slot as u32, first..first + blocks, access);
            if locks.acquire(claim.clone()) {
                granted.add(&claim);
            } else {
                waiting.insert((worker, slot as u32), claim);
            }
            if number < 45 {
                release(&mut granted, &mut waiting, number);
            }
        }
        while !granted.0.is_empty() {
            release(&mut granted, &mut waiting, 0);
        }
        prop_assert!(waiting.is_empty(), "{waiting:?} wait although all blocks are free");
        prop_assert_eq!(locks.contenders.0.load(Ordering::SeqCst), 0);
    }
}

/// The short way of shared claims against the rest, on threads: a plain number for each block shows a change that was lost.
#[test]
fn no_two_threads_have_a_block_when_one_of_them_has_it_alone() {
    use std::sync::atomic::AtomicU64;
    use std::sync::mpsc::{Sender, channel};

    const THREADS: usize = 3;
    const BLOCKS: u64 = 4;
    const CLAIMS: u32 = 20_000;
    let locks = BlockLocks::new(THREADS);
    // The holders of each block: a shared hold counts 1, a hold alone counts a lot.
    let users: Vec<AtomicU64> = (0..BLOCKS).map(|_| AtomicU64::new(0)).collect();
    let (senders, receivers): (Vec<Sender<u32>>, Vec<_>) = (0..THREADS).map(|_| channel()).unzip();
    std::thread::scope(|scope| {
        for (worker, granted) in receivers.into_iter().enumerate() {
            let (locks, users, senders) = (&locks, &users, senders.clone());
            scope.spawn(move || {
                let mut rng = fastrand::Rng::with_seed(worker as u64);
                for slot in 0..CLAIMS {
                    let first = rng.u64(0..BLOCKS);
                    let blocks = first..rng.u64(first + 1..=BLOCKS);
                    let access = if rng.u8(0..4) == 0 { Access::Alone } else { Access::Shared };
                    let slot = slot % 5;
                    if !locks.acquire(claim(worker, slot, blocks.clone(), access)) {
                        assert_eq!(granted.recv().unwrap(), slot);
                    }
                    let weight = if access == Access::Alone { 1 << 32 } else { 1 };
                    for block in blocks.clone() {
                        let before = users[block as usize].fetch_add(weight, Ordering::SeqCst);
                        assert!(before < if access == Access::Alone { 1 } else { 1 << 32 }, "{before:#x}");
                    }
                    for block in blocks {
                        users[block as usize].fetch_sub(weight, Ordering::SeqCst);
                    }
                    for owner in locks.release(Owner { worker, slot }, access) {
                        senders[owner.worker].send(owner.slot).unwrap();
                    }
                }
            });
        }
        drop(senders);
    });
    assert_eq!(locks.contenders.0.load(Ordering::SeqCst), 0);
}
