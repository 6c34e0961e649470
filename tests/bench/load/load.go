// Package load is the traffic of the benchmark: one server and a few clients, on epoll and non-blocking sockets, so that
// they take as little of the machine as can be from what is measured. It runs in processes of its own, one call each.
package load

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Ports of the server.
const (
	PortSink    = 7000 // takes bytes and, at their end, answers with their number
	PortEcho    = 7001 // answers each read with the same bytes
	PortOnce    = 7002 // answers one read with the same bytes and closes
	PortRequest = 7003 // HTTP/1.1 with keepalive
)

// Client is one run of a client.
type Client struct {
	// Kind is bulk, pingpong, request, connect or idle.
	Kind string
	// Addr is the server's IPv4 address.
	Addr string
	// Connections at once.
	Connections int
	// Size in bytes of what is sent at once by pingpong and connect.
	Size int
	// Warm is how long the client runs before what it reports begins; Duration is how long that takes.
	Warm, Duration time.Duration
}

// Result is what a client has seen. Units is the work done in the whole run, warming up included: bytes, round trips,
// requests or connections; by it CPU time is divided.
type Result struct {
	Units  float64 `json:"units"`
	Rate   float64 `json:"rate"` // units a second, without warming up
	P50    float64 `json:"p50_us"`
	P99    float64 `json:"p99_us"`
	Errors int     `json:"errors"`
	First  string  `json:"first_error,omitempty"`
}

func (r *Result) failed(err error) {
	r.Errors++
	if r.First == "" {
		r.First = err.Error()
	}
}

// latencies fills in the percentiles, in microseconds, of round trips in nanoseconds.
func (r *Result) latencies(nanoseconds []int64) {
	if len(nanoseconds) == 0 {
		return
	}
	slices.Sort(nanoseconds)
	at := func(p float64) float64 { return float64(nanoseconds[int(p*float64(len(nanoseconds)-1))]) / 1000 }
	r.P50, r.P99 = at(.5), at(.99)
}

// Main is the program's part when it is called as `load server` or `load {client as JSON}`. A client prints its Result.
func Main(args []string) error {
	if len(args) != 1 {
		return fmt.Errorf("load: want one argument, have %q", strings.Join(args, " "))
	}
	if args[0] == "server" {
		return serve()
	}
	var c Client
	if err := json.Unmarshal([]byte(args[0]), &c); err != nil {
		return fmt.Errorf("load: %w", err)
	}
	clients := map[string]func(Client) (Result, error){
		"bulk": bulk, "pingpong": pingpong, "request": request, "connect": connect, "idle": idle,
	}
	run := clients[c.Kind]
	if run == nil {
		return fmt.Errorf("load: no client %q", c.Kind)
	}
	r, err := run(c)
	if err != nil {
		return fmt.Errorf("load: %s: %w", c.Kind, err)
	}
	if err := json.NewEncoder(os.Stdout).Encode(r); err != nil {
		return err
	}
	if c.Kind == "idle" {
		return unix.Pause() // holds its connections until it is ended
	}
	return nil
}
