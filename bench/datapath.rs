//! The way of packets through the device, without sockets: sealing and opening batches, a large packet
//! out, a run of datagrams in, and the look-up of an owner.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::net::Ipv4Addr;

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use ipnet::{IpNet, Ipv4Net};
use selvedge::wireguard::bench_support::{DevicePair, Run, superpacket};
use selvedge::wireguard::table::AllowedIps;

/// Datagrams in a batch: what one send with segmentation offload holds.
const BATCH: u16 = 44;

fn sessions(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("session");
    for length in [64_usize, 1420] {
        group.throughput(Throughput::Elements(BATCH.into()));
        group.bench_with_input(BenchmarkId::new("seal", length), &length, |bencher, _| {
            let bench = DevicePair::default();
            let mut run = Run::of_zeros(BATCH.into(), length);
            bencher.iter(|| bench.seal(&mut run));
        });
        group.bench_with_input(BenchmarkId::new("open", length), &length, |bencher, _| {
            let sealing = DevicePair::default();
            let mut opening = DevicePair::default();
            bencher.iter_batched_ref(
                || {
                    let mut run = Run::of_zeros(BATCH.into(), length);
                    sealing.seal(&mut run);
                    run
                },
                |run| opening.open(run),
                BatchSize::SmallInput,
            );
        });
    }
    group.finish();
}

fn device(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("device");
    let packet = superpacket(BATCH, 1380);
    group.throughput(Throughput::Bytes(packet.len() as u64));
    group.bench_function("transmit", |bencher| {
        let mut bench = DevicePair::default();
        bencher.iter(|| bench.transmit(&packet));
    });
    group.bench_function("receive", |bencher| {
        let (mut sending, mut receiving) = (DevicePair::default(), DevicePair::default());
        bencher.iter_batched_ref(
            || sending.transmitted(&packet),
            |runs| {
                runs.iter_mut()
                    .map(|run| receiving.receive(run))
                    .sum::<usize>()
            },
            BatchSize::SmallInput,
        );
    });
    group.finish();
}

fn table(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("owner");
    for count in [1_u32, 100, 10_000] {
        let net = |n: u32| {
            let address = Ipv4Addr::from(0x0a00_0000 + (n << 8));
            IpNet::V4(Ipv4Net::new_assert(address, 24))
        };
        let table = AllowedIps::new((0..count).map(|n| (net(n), n)).collect::<BTreeMap<_, _>>());
        let address = Ipv4Addr::from(0x0a00_0007 + ((count / 2) << 8)).into();
        group.bench_with_input(BenchmarkId::from_parameter(count), &count, |bencher, _| {
            bencher.iter(|| table.get(black_box(address)));
        });
    }
    group.finish();
}

criterion_group!(benches, sessions, device, table);
criterion_main!(benches);
