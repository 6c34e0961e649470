// Command redirect measures redirection alone: how fast a pod's connections are made through an accept-and-splice proxy
// when iptables, nftables or Fairlead's programs lead them there, in one run, lane by lane in turns; and what it takes the
// CNI agent to capture pods that start at once, and how much memory it has with a full node (capture.go).
//
// The host and the pods are network namespaces (network.go); each lane is a pod with its redirection (lane.go) and a
// proxy of its own, which is the same program in all of them; one server answers all (roles.go).
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"syscall"
	"text/tabwriter"
	"time"
)

// insideVariable marks the process that has namespaces of its own.
const insideVariable = "FAIRLEAD_BENCH_REDIRECT"

func main() {
	if len(os.Args) > 1 && roles[os.Args[1]] != nil {
		exit(roles[os.Args[1]](os.Args[2:]))
	}
	reps := flag.Int("reps", 7, "how often each lane is measured")
	duration := flag.Duration("duration", 1500*time.Millisecond, "how long a measurement lasts")
	agent := flag.String("agent", "bin/cni-agent", "the CNI agent to measure; empty: none")
	rounds := flag.Int("rounds", 5, "how often pods start at once")
	out := flag.String("out", "out/bench", "directory for redirect.json and capture.json")
	flag.Parse()
	if os.Getenv(insideVariable) == "" {
		exit(enter())
	}
	// Children end with the thread that started them.
	runtime.LockOSThread()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	exit(run(ctx, *reps, *duration, *agent, *rounds, *out))
}

func exit(err error) {
	if err == nil {
		os.Exit(0)
	}
	fmt.Fprintln(os.Stderr, "bench redirect:", err)
	os.Exit(1)
}

// enter runs this program again with a network and mounts of its own, which end with it.
func enter() error {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), insideVariable+"=1")
	runtime.LockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGTERM}
	signal.Ignore(os.Interrupt) // the terminal sends it to the child too
	return cmd.Run()
}

// figure is one measurement.
type figure struct {
	Lane    string
	Workers int
	// PerSecond counts connections that were made, answered and closed.
	PerSecond float64
	// P50 and P99 are times from connect to the answer.
	P50, P99 time.Duration
	// CPU is the processor time of application, proxy and server for one connection: other than the times above, it does
	// not depend on what else the machine does.
	CPU    time.Duration
	Failed int
}

var workers = []int{16, 1}

// run measures in one world: the lanes first.
func run(ctx context.Context, reps int, duration time.Duration, agent string, rounds int, out string) (err error) {
	w, err := newWorld()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.close()) }()
	if reps > 0 {
		if err := runLanes(ctx, w, reps, duration, out); err != nil {
			return err
		}
	}
	if agent == "" || rounds == 0 {
		return nil
	}
	c, err := w.capture(ctx, agent, rounds)
	if err != nil {
		return fmt.Errorf("capture: %w", err)
	}
	if err := write(filepath.Join(out, "capture.json"), c); err != nil {
		return err
	}
	return c.report(os.Stdout)
}

func runLanes(ctx context.Context, w *world, reps int, duration time.Duration, out string) error {
	for _, lane := range lanes {
		if err := w.open(ctx, lane); err != nil {
			return fmt.Errorf("lane %s: %w", lane.name, err)
		}
	}
	var all []figure
	for rep := range reps {
		for _, n := range workers {
			for _, p := range w.pods {
				if err := ctx.Err(); err != nil {
					return err
				}
				f, err := w.measure(p, n, duration)
				if err != nil {
					return fmt.Errorf("lane %s: %w", p.lane, err)
				}
				all = append(all, f)
			}
		}
		fmt.Fprintf(os.Stderr, "round %d of %d\n", rep+1, reps)
	}
	if err := write(filepath.Join(out, "redirect.json"), all); err != nil {
		return err
	}
	return report(os.Stdout, all)
}

func write(path string, all any) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	text, err := json.MarshalIndent(all, "", " ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(text, '\n'), 0o644)
}

// report prints medians, and how each lane compares with iptables: the median of what each round says, as the two
// measurements of a round are neighbours.
func report(to io.Writer, all []figure) error {
	table := tabwriter.NewWriter(to, 2, 0, 2, ' ', 0)
	fmt.Fprintln(table, "redirection\tworkers\tconnects/s\t[min..max]\tp50\tp99\tCPU each\tto iptables: connects/s\tp50\tCPU")
	for _, n := range workers {
		base := pick(all, iptables, n)
		for _, lane := range lanes {
			mine := pick(all, lane.name, n)
			rate := func(f figure) float64 { return f.PerSecond }
			p50 := func(f figure) float64 { return float64(f.P50) }
			p99 := func(f figure) float64 { return float64(f.P99) }
			cpu := func(f figure) float64 { return float64(f.CPU) }
			var rates, times, cpus []float64
			for i, f := range mine {
				cpus = append(cpus, cpu(f)/cpu(base[i]))
				rates = append(rates, f.PerSecond/base[i].PerSecond)
				times = append(times, p50(f)/p50(base[i]))
			}
			each := values(mine, rate)
			fmt.Fprintf(table, "%s\t%d\t%.0f\t[%.0f..%.0f]\t%v\t%v\t%v\t%+.0f %%\t%+.0f %%\t%+.0f %%\n", lane.name, n, median(each), slices.Min(each),
				slices.Max(each), rounded(median(values(mine, p50))), rounded(median(values(mine, p99))),
				rounded(median(values(mine, cpu))), 100*(median(rates)-1), 100*(median(times)-1), 100*(median(cpus)-1))
		}
	}
	return table.Flush()
}

func pick(all []figure, lane string, workers int) (some []figure) {
	for _, f := range all {
		if f.Lane == lane && f.Workers == workers {
			some = append(some, f)
		}
	}
	return some
}

func values(of []figure, value func(figure) float64) []float64 {
	var all []float64
	for _, f := range of {
		all = append(all, value(f))
	}
	return all
}

func median(of []float64) float64 {
	sorted := slices.Sorted(slices.Values(of))
	return sorted[len(sorted)/2]
}

func rounded(nanoseconds float64) time.Duration {
	return time.Duration(nanoseconds).Round(time.Microsecond)
}
