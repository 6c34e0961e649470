package redirect_test

import (
	"io"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/fairlead-mesh/fairlead/cni/redirect"
	"github.com/fairlead-mesh/fairlead/internal/netns"
)

// BenchmarkGuard measures what the guard costs a pod's traffic: through one connection of the proxy's to the world, the guard
// is taken away and put back between short measurements, so that what else the machine does concerns both alike. With
// -benchtime 30x there are 30 of each. What the guard itself takes is counted by the kernel, in measurements of their own.
func BenchmarkGuard(b *testing.B) {
	const bulk, pings = 128 << 20, 4000
	for _, tc := range []struct {
		name string
		// measure uses a connection to an echoing or a discarding server and returns what a unit took.
		measure func(net.Conn) (time.Duration, error)
		echo    bool
		// unit is what the metrics are called after, bytes how many of them a measurement carries.
		unit  string
		bytes float64
	}{
		{"bulk", func(c net.Conn) (time.Duration, error) { return send(c, bulk) }, false, "s/GB", bulk},
		{"pingpong", func(c net.Conn) (time.Duration, error) { return pingPong(c, pings) }, true, "s/100k", 0},
	} {
		b.Run(tc.name, func(b *testing.B) {
			l := newLab(b, redirect.EBPF)
			l.ensureFresh(b)
			conn := l.carry(b, tc.echo)
			var with, without []time.Duration
			var own, segments float64
			for b.Loop() {
				for _, guarded := range []bool{true, false} {
					restore := func() {}
					if !guarded {
						restore = l.unguard(b)
					}
					took, err := tc.measure(conn)
					restore()
					if err != nil {
						b.Fatal(err)
					}
					if guarded {
						with = append(with, took)
					} else {
						without = append(without, took)
					}
				}
				ran, n := l.guardRuns(b, func() error { _, err := tc.measure(conn); return err })
				own, segments = own+ran.Seconds(), segments+n
			}
			median := func(of []time.Duration) float64 { return float64(slices.Sorted(slices.Values(of))[len(of)/2]) }
			var changes []time.Duration // in thousandths
			for i := range with {
				changes = append(changes, 1000*with[i]/without[i]-1000)
			}
			per := float64(b.N) * tc.bytes / 1e9
			if tc.echo {
				per = float64(b.N) * pings / 1e5
			}
			b.ReportMetric(median(with)/1e3, "µs-with")
			b.ReportMetric(median(without)/1e3, "µs-without")
			b.ReportMetric(median(changes)/10, "%-more")
			b.ReportMetric(1e9*own/segments, "guard-ns/segment")
			b.ReportMetric(own/per, "guard-"+tc.unit)
		})
	}
}

// carry opens a connection of the proxy's from the pod to a server on the host, which sends back what it gets if echo is set.
func (l *lab) carry(b *testing.B, echo bool) net.Conn {
	var server net.Listener
	at := netip.AddrPortFrom(remote4, 80)
	err := netns.Do(l.host, func() (err error) {
		server, err = net.Listen("tcp", at.String())
		return err
	})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { server.Close() })
	go func() {
		conn, err := server.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		to := io.Discard
		if echo {
			to = conn
		}
		// Ends with the connection. Without the methods that would let the kernel copy.
		_, _ = io.CopyBuffer(struct{ io.Writer }{to}, struct{ io.Reader }{conn}, make([]byte, 256<<10))
	}()
	conn, err := netns.Dial(b.Context(), l.pod, netns.DialOptions{Mark: netns.ProxyMark}, at)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { conn.Close() })
	return conn
}

// send sends bytes, and returns how long 64 KiB took.
func send(conn net.Conn, bytes int) (time.Duration, error) {
	buf := make([]byte, 64<<10)
	began := time.Now()
	for range bytes / len(buf) {
		if _, err := conn.Write(buf); err != nil {
			return 0, err
		}
	}
	return time.Since(began) / time.Duration(bytes/len(buf)), nil
}

// pingPong sends 64 bytes there and back, and returns the median of the times that took.
func pingPong(conn net.Conn, times int) (time.Duration, error) {
	buf := make([]byte, 64)
	took := make([]time.Duration, times)
	for i := range took {
		began := time.Now()
		if _, err := conn.Write(buf); err != nil {
			return 0, err
		}
		if _, err := io.ReadFull(conn, buf); err != nil {
			return 0, err
		}
		took[i] = time.Since(began)
	}
	slices.Sort(took)
	return took[len(took)/2], nil
}

// guardRuns is how long the guard ran, and how often, while f did.
func (l *lab) guardRuns(b *testing.B, f func() error) (ran time.Duration, times float64) {
	_, guard := l.guardFilter(b)
	program, err := ebpf.NewProgramFromID(ebpf.ProgramID(guard.Id))
	if err != nil {
		b.Fatal(err)
	}
	defer program.Close()
	stats, err := ebpf.EnableStats(unix.BPF_STATS_RUN_TIME)
	if err != nil {
		b.Fatal(err)
	}
	defer stats.Close()
	before, err := program.Stats()
	if err != nil {
		b.Fatal(err)
	}
	if err := f(); err != nil {
		b.Fatal(err)
	}
	after, err := program.Stats()
	if err != nil || after.RunCount == before.RunCount {
		b.Fatalf("the guard did not run: %v", err)
	}
	return after.Runtime - before.Runtime, float64(after.RunCount - before.RunCount)
}
