//! What the driver notices about a device that breaks the rules.

use vm_memory::{Bytes, GuestAddress};

use super::{DriverVring, Used, VringLayout};
use crate::{
    descriptor::{Descriptor, linked_table},
    event::Eventfds,
    ram::{Arena, Ram},
};

fn vring() -> DriverVring {
    let ram = Ram::single(1 << 20).unwrap();
    let layout = VringLayout::take(&mut ram.regions()[0].arena(), 8).unwrap();
    DriverVring::new(&ram, layout, false, Eventfds::new().unwrap()).unwrap()
}

/// The device uses a chain as the `index`th.
fn use_chain(vring: &DriverVring, index: u16, id: u32) {
    let VringLayout { used_gpa, .. } = vring.layout();
    let memory = vring.ram().memory();
    memory.write_obj([id, 7], GuestAddress(used_gpa + 4 + 8 * u64::from(index))).unwrap();
    memory.write_obj(index + 1, GuestAddress(used_gpa + 2)).unwrap();
}

/// Makes chains of one descriptor available. Returns their heads.
fn send<const CHAINS: usize>(vring: &mut DriverVring) -> [u16; CHAINS] {
    let heads = [(); CHAINS].map(|()| vring.add(&[Descriptor::readable(0, 1)]).unwrap());
    assert!(vring.publish().unwrap(), "the device wants kicks");
    heads
}

#[test]
fn used_chains_come_in_the_order_of_the_device() {
    let mut vring = vring();
    let [first, second] = send(&mut vring);
    use_chain(&vring, 0, second.into());
    use_chain(&vring, 1, first.into());
    for head in [second, first] {
        assert_eq!(vring.take_used().unwrap(), Some(Used { head, len_bytes: 7 }));
    }
    assert_eq!(vring.take_used().unwrap(), None);
    assert!(vring.has_room(8));
}

#[test]
fn a_chain_that_is_used_twice_is_an_error() {
    let mut vring = vring();
    let [first, _second] = send(&mut vring);
    for index in [0, 1] {
        use_chain(&vring, index, first.into());
    }
    assert!(vring.take_used().unwrap().is_some());
    let error = vring.take_used().unwrap_err().to_string();
    assert_eq!(error, format!("a used element for chain {first}, which is not outstanding"));
}

#[test]
fn a_chain_outside_the_table_is_an_error() {
    let mut vring = vring();
    let [_first] = send(&mut vring);
    use_chain(&vring, 0, 1 << 16);
    assert_eq!(vring.take_used().unwrap_err().to_string(), "a used element for chain 65536");
}

#[test]
fn more_used_elements_than_chains_are_an_error() {
    let mut vring = vring();
    let [first] = send(&mut vring);
    use_chain(&vring, 0, first.into());
    use_chain(&vring, 1, 3);
    let error = vring.take_used().unwrap_err().to_string();
    assert_eq!(error, "2 used elements, and only 1 chains are outstanding");
}

#[test]
fn a_table_links_its_descriptors_and_ends_with_the_last() {
    let chain = [Descriptor::readable(1, 2), Descriptor::writable(3, 4)];
    let expected = [chain[0].linked_to(1).to_bytes(), chain[1].to_bytes()].concat();
    assert_eq!(linked_table(&chain).unwrap(), expected);
}

#[test]
fn an_arena_gives_no_more_than_it_has() {
    let mut arena = Arena::new(0x10, 0x100);
    assert_eq!(arena.take(0x80, 0x20).unwrap(), 0x20);
    assert_eq!(arena.take(0x80, 1).unwrap_err().to_string(), "128 bytes of RAM asked for, 112 left");
    assert_eq!(arena.take(0x70, 1).unwrap(), 0xa0);
}
