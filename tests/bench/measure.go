package main

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fairlead-mesh/fairlead/tests/bench/load"
)

// test is one kind of traffic.
type test struct {
	name  string
	about string
	load  load.Client // Addr, Warm and Duration are filled in
	to    role
	// oneCPU: everything runs on one CPU meanwhile. A round trip is then as long as all the software on its way, without
	// the wake-ups between CPUs that make it jump on a virtual machine.
	oneCPU bool
	// perUnits units are one unit of the table's CPU column; unit and rate are the names of what is divided by and counted.
	perUnits float64
	unit     string
	rate     string
	rateOf   float64 // a rate is divided by this
	// higher rates are better; pingpong is judged by its latency.
	latency bool
	// beside runs at the same time, with the same server; the latencies are its, all else is load's.
	beside *load.Client
}

const gigabyte = 1e9

var tests = []test{
	{name: "bulk1", about: "1 stream", load: load.Client{Kind: "bulk", Connections: 1}, to: remote,
		perUnits: gigabyte, unit: "GB", rate: "Gbit/s", rateOf: gigabyte / 8},
	{name: "bulk8", about: "8 streams", load: load.Client{Kind: "bulk", Connections: 8}, to: remote,
		perUnits: gigabyte, unit: "GB", rate: "Gbit/s", rateOf: gigabyte / 8},
	{name: "request64", about: "HTTP requests on 64 keepalive connections", load: load.Client{Kind: "request", Connections: 64}, to: remote,
		perUnits: 1e5, unit: "100k requests", rate: "requests/s", rateOf: 1},
	{name: "pingpong", about: "64 B there and back, one at a time, everything on one CPU", load: load.Client{Kind: "pingpong", Size: 64}, to: remote,
		oneCPU: true, perUnits: 1e5, unit: "100k round trips", rate: "round trips/s", rateOf: 1, latency: true},
	{name: "connect16", about: "new connections, 16 at a time, 64 B there and back each", load: load.Client{Kind: "connect", Connections: 16, Size: 64}, to: remote,
		perUnits: 1e5, unit: "100k connections", rate: "connections/s", rateOf: 1},
	{name: "node-bulk1", about: "same node, 1 stream", load: load.Client{Kind: "bulk", Connections: 1}, to: nearby,
		perUnits: gigabyte, unit: "GB", rate: "Gbit/s", rateOf: gigabyte / 8},
	{name: "node-pingpong", about: "same node, 64 B there and back", load: load.Client{Kind: "pingpong", Size: 64}, to: nearby,
		perUnits: 1e5, unit: "100k round trips", rate: "round trips/s", rateOf: 1, latency: true},
	{name: "mixed32", about: "32 streams, and the latency of 64 B there and back beside them", load: load.Client{Kind: "bulk", Connections: 32}, to: remote,
		perUnits: gigabyte, unit: "GB", rate: "Gbit/s", rateOf: gigabyte / 8, beside: &load.Client{Kind: "pingpong", Size: 64}},
	{name: "node-pingpong-one", about: "the same, everything on one CPU", load: load.Client{Kind: "pingpong", Size: 64}, to: nearby,
		oneCPU: true, perUnits: 1e5, unit: "100k round trips", rate: "round trips/s", rateOf: 1, latency: true},
	{name: "pingpong-any", about: "64 B there and back on any CPU", load: load.Client{Kind: "pingpong", Size: 64}, to: remote,
		perUnits: 1e5, unit: "100k round trips", rate: "round trips/s", rateOf: 1, latency: true},
	{name: "request1", about: "HTTP requests on 1 connection, everything on one CPU", load: load.Client{Kind: "request", Connections: 1}, to: remote,
		oneCPU: true, perUnits: 1e5, unit: "100k requests", rate: "requests/s", rateOf: 1},
	{name: "connect1", about: "new connections, one at a time, everything on one CPU", load: load.Client{Kind: "connect", Connections: 1, Size: 64}, to: remote,
		oneCPU: true, perUnits: 1e5, unit: "100k connections", rate: "connections/s", rateOf: 1},
}

// run is one measurement.
type run struct {
	Test   string      `json:"test"`
	Lane   string      `json:"lane"`
	Rep    int         `json:"rep"`
	Result load.Result `json:"result"`
	// CPU seconds that the proxies used: the client's side, and the server's where that is another process.
	CPU []float64 `json:"proxy_cpu_s"`
	// Wall is how long it took; Own is what the benchmark with all its processes used of the CPUs in that time.
	Wall float64 `json:"wall_s"`
	Own  float64 `json:"own_cpu_s"`
	// Foreign is the CPUs used by what is no part of the benchmark; Steal what the hypervisor gave to others.
	Foreign float64 `json:"foreign_cpus"`
	Steal   float64 `json:"steal_cpus"`
	// Noisy: Foreign was above the limit in every attempt.
	Noisy bool   `json:"noisy,omitempty"`
	Error string `json:"error,omitempty"`
}

// perUnit is the CPU time of all proxies on the way for one unit of the test's table.
func (r run) perUnit(t test) float64 {
	sum := 0.0
	for _, c := range r.CPU {
		sum += c
	}
	return sum / (r.Result.Units / t.perUnits)
}

// measure runs a test on a lane, again where others used the machine too much meanwhile.
func (w *world) measure(ctx context.Context, t test, l *lane, rep int) run {
	var r run
	for attempt := 0; attempt <= w.options.retries && ctx.Err() == nil; attempt++ {
		w.awaitQuiet(ctx)
		r = w.measureOnce(ctx, t, l)
		r.Test, r.Lane, r.Rep = t.name, l.name, rep
		if r.Foreign < w.options.foreign {
			return r
		}
	}
	r.Noisy = true
	return r
}

func (w *world) measureOnce(ctx context.Context, t test, l *lane) (r run) {
	fail := func(err error) run {
		r.Error = err.Error()
		return r
	}
	if t.oneCPU {
		if err := w.group.affinity(w.cpus, 1); err != nil {
			return fail(err)
		}
		defer w.group.affinity(w.cpus, w.options.pin) // what cannot be pinned back is seen in the next run's figures
	}
	c := t.load
	c.Addr, c.Warm, c.Duration = l.pods[t.to].addr.String(), w.options.warm, w.options.duration
	if c.Kind == "bulk" {
		c.Warm = 0
	}
	before, err := w.clock(l, t.to)
	if err != nil {
		return fail(err)
	}
	result, runErr := l.runLoads(ctx, c, t.beside)
	after, err := w.clock(l, t.to)
	if err := errorsOf(runErr, err); err != nil {
		return fail(err)
	}
	r.Result = result
	for i := range after.proxies {
		r.CPU = append(r.CPU, after.proxies[i]-before.proxies[i])
	}
	r.Wall, r.Own = after.at.Sub(before.at).Seconds(), after.own-before.own
	r.Foreign = max(0, (after.busy-before.busy-r.Own)/r.Wall)
	r.Steal = (after.steal - before.steal) / r.Wall
	return r
}

// runLoads runs a client, and another beside it if there is one.
func (l *lane) runLoads(ctx context.Context, c load.Client, beside *load.Client) (load.Result, error) {
	if beside == nil {
		return l.runLoad(ctx, c)
	}
	second := *beside
	second.Addr, second.Warm = c.Addr, c.Duration/8 // so that the first has begun
	second.Duration = c.Duration - 2*second.Warm
	var latencies load.Result
	ended := make(chan error, 1)
	go func() {
		var err error
		latencies, err = l.runLoad(ctx, second)
		ended <- err
	}()
	result, err := l.runLoad(ctx, c)
	err = errorsOf(err, <-ended)
	result.P50, result.P99 = latencies.P50, latencies.P99
	result.Errors += latencies.Errors
	return result, err
}

// clocks are the CPU clocks at one moment, in seconds.
type clocks struct {
	at          time.Time
	proxies     []float64
	own         float64
	busy, steal float64
}

func (w *world) clock(l *lane, to role) (clocks, error) {
	c := clocks{at: time.Now()}
	if l != nil {
		for _, p := range l.serving(to) {
			used, err := p.group.cpu()
			if err != nil {
				return c, err
			}
			c.proxies = append(c.proxies, used)
		}
	}
	var err error
	if c.own, err = w.group.cpu(); err != nil {
		return c, err
	}
	c.busy, c.steal, err = machineCPU()
	return c, err
}

// machineCPU is the time that the machine's CPUs were busy, and what the hypervisor kept, since the start, in seconds.
func machineCPU() (busy, steal float64, err error) {
	content, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, 0, err
	}
	line, _, _ := strings.Cut(string(content), "\n")
	fields := strings.Fields(line) // cpu user nice system idle iowait irq softirq steal
	if len(fields) < 9 {
		return 0, 0, fmt.Errorf("/proc/stat begins with %q", line)
	}
	const ticks = 100 // USER_HZ, fixed by the kernel's interface
	for i, f := range fields[1:9] {
		n, err := strconv.ParseFloat(f, 64)
		if err != nil {
			return 0, 0, err
		}
		switch i {
		case 3, 4:
		case 7:
			steal = n / ticks
		default:
			busy += n / ticks
		}
	}
	return busy, steal, nil
}

// awaitQuiet waits until others use little of the machine, for as long as the options allow in all.
func (w *world) awaitQuiet(ctx context.Context) {
	for w.waited < w.options.patience && ctx.Err() == nil {
		before, err := w.clock(nil, client)
		if err != nil {
			return
		}
		time.Sleep(300 * time.Millisecond)
		after, err := w.clock(nil, client)
		if err != nil {
			return
		}
		wall := after.at.Sub(before.at)
		if (after.busy-before.busy-(after.own-before.own))/wall.Seconds() < w.options.foreign {
			return
		}
		time.Sleep(700 * time.Millisecond)
		w.waited += time.Second
	}
}

// allowedCPUs are those this process may run on.
func allowedCPUs() (unix.CPUSet, error) {
	var set unix.CPUSet
	err := unix.SchedGetaffinity(0, &set)
	return set, err
}
