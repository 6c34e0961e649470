package hbone

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/fairlead-mesh/fairlead/internal/loop"
	"github.com/fairlead-mesh/fairlead/internal/relay"
)

// TestAcceptStartBegin carries connections the way without goroutines: accepted by the driver, sent on by Start, answered by
// Begin, relayed as bare descriptors.
func TestAcceptStartBegin(t *testing.T) {
	drivers(t, func(t *testing.T, client, server Driver) {
		results := make(chan relay.Result, 64)
		p := newBegun(t, client, server, func(in *Incoming) (rest func()) {
			echo := func() {
				app, far := tcpPair(t)
				fd, err := loop.Detach(far)
				if err != nil {
					t.Error(err)
					return
				}
				s, err := in.Accept()
				if err != nil {
					t.Error(err)
					return
				}
				s.RelayFD(fd, func(r relay.Result) { results <- r })
				go func() { io.Copy(app, struct{ io.Reader }{app}); app.Close() }()
			}
			if in.Authority == "later:1" {
				return echo
			}
			echo()
			return nil
		})
		for i, authority := range []string{"now:1", "now:1", "later:1", "now:1"} {
			ln := p.listen(t, client, authority, results)
			n := 1 + 70000*i
			c, err := net.Dial("tcp", ln.String())
			if err != nil {
				t.Fatal(err)
			}
			c.SetDeadline(time.Now().Add(20 * time.Second))
			want := pattern(n, n)
			go func() { c.Write(want); c.(*net.TCPConn).CloseWrite() }()
			if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%d bytes: got %d, %v", n, len(got), err)
			}
			c.Close()
			for range 2 {
				if r := <-results; r != (relay.Result{Sent: int64(n), Received: int64(n)}) {
					t.Errorf("%d bytes: %+v", n, r)
				}
			}
		}
	})
}

func TestStartTellsWhatHappened(t *testing.T) {
	drivers(t, func(t *testing.T, client, server Driver) {
		never := make(chan struct{})
		defer close(never)
		p := newBegun(t, client, server, func(in *Incoming) (rest func()) {
			switch in.Authority {
			case "silent:1":
				return func() { <-never }
			case "forgotten:1":
				return nil
			}
			in.Reject(401, "no")
			return nil
		})
		for range 2 { // the second on a tunnel that stands
			for _, tc := range []struct {
				authority string
				is        func(error) bool
			}{
				{"refused:1", func(err error) bool { return statusIs(err, 401) }},
				{"forgotten:1", func(err error) bool { return statusIs(err, 500) }},
				{"silent:1", func(err error) bool { return errors.Is(err, context.DeadlineExceeded) }},
			} {
				got := make(chan error, 1)
				p.pool.Start(t.Context(), 300*time.Millisecond, p.key, p.dial, Request{Authority: tc.authority}, -1, func(_ *Stream, err error) { got <- err })
				if err := <-got; !tc.is(err) {
					t.Errorf("%s: %v", tc.authority, err)
				}
			}
		}
		p.pool.Close()
		got := make(chan error, 1)
		p.pool.Start(t.Context(), time.Second, p.key, p.dial, Request{Authority: "a:1"}, -1, func(_ *Stream, err error) { got <- err })
		if err := <-got; !errors.Is(err, ErrClosed) {
			t.Errorf("a closed pool: %v", err)
		}
	})
}

func statusIs(err error, code int) bool {
	var status *StatusError
	return errors.As(err, &status) && status.Code == code
}

// TestAcceptStops sees that no connection is accepted after stop, and that those before it were.
func TestAcceptStops(t *testing.T) {
	drivers(t, func(t *testing.T, client, _ Driver) {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		type arrival struct {
			fd   int
			from netip.AddrPort
		}
		came := make(chan arrival, 1)
		stop, err := client.Accept(ln.(*net.TCPListener), func(fd int, addr netip.AddrPort) {
			if local := loop.LocalAddr(fd).String(); local != ln.Addr().String() {
				t.Errorf("accepted at %s", local)
			}
			came <- arrival{fd, addr}
		}, func(err error) { t.Error(err) })
		if err != nil {
			t.Fatal(err)
		}
		c, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		got := <-came
		if got.from.String() != c.LocalAddr().String() {
			t.Errorf("from %v, want %v", got.from, c.LocalAddr())
		}
		loop.Reset(got.fd)
		c.SetReadDeadline(time.Now().Add(10 * time.Second))
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, errConnReset) {
			t.Errorf("the client sees %v", err)
		}
		stop()
		stop()
		ln.Close()
		if c, err := net.Dial("tcp", ln.Addr().String()); err == nil {
			c.Close()
			t.Error("connected after the end")
		}
	})
}

func newBegun(t *testing.T, client, server Driver, begin func(*Incoming) func()) *pair {
	t.Helper()
	return newPairOf(t, client, server, PoolConfig{}, ServerConfig{Begin: begin})
}

// listen lets the client's driver accept connections and send them on to authority.
func (p *pair) listen(t *testing.T, driver Driver, authority string, results chan<- relay.Result) net.Addr {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	stop, err := driver.Accept(ln.(*net.TCPListener), func(fd int, _ netip.AddrPort) {
		p.pool.Start(context.Background(), 10*time.Second, p.key, p.dial, Request{Authority: authority}, fd, func(s *Stream, err error) {
			if err != nil {
				t.Error(err)
				loop.Reset(fd)
				return
			}
			s.RelayFD(fd, func(r relay.Result) { results <- r })
		})
	}, func(err error) { t.Error(err) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stop(); ln.Close() })
	return ln.Addr()
}
