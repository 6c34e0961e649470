package main

import (
	"fmt"
	"math"
	"strings"
)

// goal is what Fairlead is to reach on a test, measured against a peer of the same run.
type goal struct {
	test string
	peer string
	what string
	of   func(s summary) spread
	// times the peer's median: at most, or at least where more is better.
	times float64
	more  bool
}

func cpuOf(s summary) spread  { return s.cpu }
func rateOf(s summary) spread { return s.rate }
func p50Of(s summary) spread  { return s.p50 }
func p99Of(s summary) spread  { return s.p99 }

// goals are those that the project has set itself.
var goals = []goal{
	{"bulk1", "ztunnel", "CPU s/GB", cpuOf, 0.85, false},
	{"bulk1", "ztunnel", "Gbit/s", rateOf, 1.2, true},
	{"bulk8", "ztunnel", "CPU s/GB", cpuOf, 0.85, false},
	{"bulk8", "ztunnel", "Gbit/s", rateOf, 1.2, true},
	{"request64", "envoy", "CPU s/100k requests", cpuOf, 0.65, false},
	{"request64", "envoy", "requests/s", rateOf, 1.3, true},
	{"pingpong", "ztunnel", "p50", p50Of, 0.65, false},
	{"pingpong", "ztunnel", "p99", p99Of, 0.65, false},
	{"connect16", "ztunnel", "CPU s/100k connections", cpuOf, 0.4, false},
	{"connect16", "ztunnel", "connections/s", rateOf, 2, true},
	{"node-bulk1", "ztunnel", "Gbit/s", rateOf, 3.5, true},
	{"node-pingpong", "ztunnel", "p50", p50Of, 0.4, false},
}

// Goals in memory, of the greater of both sides.
const (
	goalIdleMiB       = 17
	goalConnectionKiB = 2
)

// goalTable compares the lane fairlead with the goals; nothing is said of what was not measured.
func (w *world) goalTable(f figures) string {
	var b strings.Builder
	for _, g := range goals {
		own, theirs := w.median(f, g, "fairlead"), w.median(f, g, g.peer)
		if math.IsNaN(own) || math.IsNaN(theirs) || theirs == 0 {
			continue
		}
		sign, reached := "≤", own <= g.times*theirs
		if g.more {
			sign, reached = "≥", own >= g.times*theirs
		}
		fmt.Fprintf(&b, "| %s, %s | %s | %s %s | %s %g× | %.2f× | %s |\n",
			g.test, g.what, digits(own), digits(theirs), g.peer, sign, g.times, own/theirs, word(reached))
	}
	for _, m := range f.memory {
		if m.Lane != "fairlead" || m.Error != "" {
			continue
		}
		idle, each := greatest(m.Idle), greatest(m.each())
		fmt.Fprintf(&b, "| memory, idle MiB | %s | | ≤ %d | | %s |\n", digits(idle), goalIdleMiB, word(idle <= goalIdleMiB))
		fmt.Fprintf(&b, "| memory, KiB an idle connection | %s | | ≤ %d | | %s |\n", digits(each), goalConnectionKiB, word(each <= goalConnectionKiB))
	}
	if b.Len() == 0 {
		return ""
	}
	return "\n**goals**, medians of this run\n\n| | Fairlead | peer | goal | is | |\n|---|---|---|---|---|---|\n" + b.String()
}

func (w *world) median(f figures, g goal, lane string) float64 {
	for _, t := range tests {
		if t.name == g.test {
			s, _ := summarize(f, t, lane)
			return g.of(s).Median
		}
	}
	return math.NaN()
}

func greatest(values []float64) float64 {
	most := math.Inf(-1)
	for _, v := range values {
		most = max(most, v)
	}
	return most
}

func word(reached bool) string {
	if reached {
		return "reached"
	}
	return "**not reached**"
}
