package zds

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap/zaptest"
	"golang.org/x/sys/unix"

	"github.com/fairlead-mesh/fairlead/api/zds"
)

// proxy records what its agent says.
type proxy struct {
	mu     sync.Mutex
	pods   map[string]string // uid to what the descriptor reads
	said   []string
	refuse error
	event  chan struct{}
}

func newProxy() *proxy { return &proxy{pods: map[string]string{}, event: make(chan struct{}, 100)} }

func (p *proxy) note(format string, args ...any) {
	p.said = append(p.said, fmt.Sprintf(format, args...))
	p.event <- struct{}{}
}

func (p *proxy) Add(_ context.Context, w Workload) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	defer w.Netns.Close()
	content := make([]byte, 100)
	n, err := w.Netns.ReadAt(content, 0)
	if n == 0 {
		return err
	}
	p.note("add %s %s/%s %s %s", w.UID, w.Namespace, w.Name, w.ServiceAccount, content[:n])
	if p.refuse != nil {
		return p.refuse
	}
	p.pods[w.UID] = string(content[:n])
	return nil
}

func (p *proxy) Delete(uid string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.pods, uid)
	p.note("delete %s", uid)
	return nil
}

func (p *proxy) Snapshot(named map[string]struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	maps.DeleteFunc(p.pods, func(uid, _ string) bool { _, ok := named[uid]; return !ok })
	p.note("snapshot %v", slices.Sorted(maps.Keys(named)))
}

func (p *proxy) heard(t *testing.T, want ...string) {
	t.Helper()
	deadline := time.After(5 * time.Second)
	for {
		p.mu.Lock()
		said := slices.Clone(p.said)
		p.mu.Unlock()
		if len(said) >= len(want) {
			if diff := cmp.Diff(want, said); diff != "" {
				t.Fatalf("the proxy heard (-want +got):\n%s", diff)
			}
			return
		}
		select {
		case <-p.event:
		case <-deadline:
			t.Fatalf("the proxy heard %q, want %q", said, want)
		}
	}
}

// agent starts a server on a socket of its own.
func agent(t *testing.T) (s *Server, socket string, stop func()) {
	t.Helper()
	s = NewServer(zaptest.NewLogger(t))
	socket = filepath.Join(t.TempDir(), "z.sock")
	return s, socket, serve(t, s, socket)
}

func serve(t *testing.T, s *Server, socket string) func() {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, socket) }()
	var once sync.Once
	stop := func() {
		once.Do(func() {
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
	}
	t.Cleanup(stop)
	for {
		if _, err := os.Stat(socket); err == nil {
			return stop
		}
		time.Sleep(time.Millisecond)
	}
}

// connect runs a client until the test or stop ends it.
func connect(t *testing.T, socket string, h Handler) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		c := &Client{Socket: socket, Handler: h, Log: zaptest.NewLogger(t)}
		if err := c.Run(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("client ended: %v", err)
		}
	}()
	var once sync.Once
	stop = func() { once.Do(func() { cancel(); <-done }) }
	t.Cleanup(stop)
	return stop
}

// stand makes a file that stands for a network namespace.
func stand(t *testing.T, content string) *os.File {
	t.Helper()
	path := filepath.Join(t.TempDir(), "netns")
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func within(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func TestAddDeleteSnapshot(t *testing.T) {
	s, socket, _ := agent(t)
	web := Workload{UID: "u1", Name: "web", Namespace: "shop", ServiceAccount: "w", Netns: stand(t, "ns1")}
	p := newProxy()
	added := make(chan error, 1)
	go func() { added <- s.Add(within(t), web) }()
	connect(t, socket, p)
	if err := <-added; err != nil {
		t.Fatal(err)
	}
	s.Keep("u9")
	p.heard(t, "add u1 shop/web w ns1")
	s.Synced()
	p.heard(t, "add u1 shop/web w ns1", "snapshot [u1]")
	if err := s.Delete(within(t), "u1"); err != nil {
		t.Fatal(err)
	}
	if err := s.Delete(within(t), "never there"); err != nil {
		t.Fatal(err)
	}
	p.heard(t, "add u1 shop/web w ns1", "snapshot [u1]", "delete u1")
}

func TestSnapshotNamesWhatIsKept(t *testing.T) {
	s, socket, _ := agent(t)
	s.Keep("u9")
	s.Synced()
	p := newProxy()
	connect(t, socket, p)
	p.heard(t, "snapshot [u9]")
}

// slow is a proxy that takes its time for its first pod.
type slow struct {
	*proxy
	first   chan string
	proceed chan struct{}
}

func (p slow) Add(ctx context.Context, w Workload) error {
	select {
	case p.first <- w.UID:
		<-p.proceed
	default:
	}
	return p.proxy.Add(ctx, w)
}

// TestSnapshotNamesWhatIsAddedAgain: an agent that has just started adds its pods from its records, and again once it has seen
// them. A proxy that has not got to a pod in between is told of it all the same before the snapshot, upon which it would
// drop it and its listeners.
func TestSnapshotNamesWhatIsAddedAgain(t *testing.T) {
	s, socket, _ := agent(t)
	pods := map[string]Workload{}
	for _, uid := range []string{"u1", "u2"} {
		pods[uid] = Workload{UID: uid, Name: uid, Namespace: "shop", ServiceAccount: "a", Netns: stand(t, uid)}
		at := within(t)
		go s.Add(at, pods[uid])
	}
	for known := 0; known < 2; time.Sleep(time.Millisecond) {
		s.mu.Lock()
		known = len(s.pods)
		s.mu.Unlock()
	}
	p := slow{newProxy(), make(chan string, 1), make(chan struct{})}
	connect(t, socket, p)
	waiting := "u1"
	select {
	case first := <-p.first:
		if first == "u1" {
			waiting = "u2"
		}
	case <-time.After(5 * time.Second):
		t.Fatal("the proxy is told of nothing")
	}
	p.first <- "" // no other is slow
	s.Synced()
	again := make(chan error, 1)
	old := s.current(waiting)
	go func() { again <- s.Add(within(t), pods[waiting]) }()
	for s.current(waiting) == old {
		time.Sleep(time.Millisecond)
	}
	close(p.proceed)
	if err := <-again; err != nil {
		t.Fatal(err)
	}
	first := "u1"
	if waiting == first {
		first = "u2"
	}
	add := func(uid string) string { return fmt.Sprintf("add %s shop/%s a %s", uid, uid, uid) }
	p.heard(t, add(first), add(waiting), "snapshot [u1 u2]", add(waiting))
}

func TestRefusalReachesTheAgent(t *testing.T) {
	s, socket, _ := agent(t)
	p := newProxy()
	p.refuse = errors.New("no room")
	connect(t, socket, p)
	err := s.Add(within(t), Workload{UID: "u1", Name: "web", Namespace: "shop", Netns: stand(t, "ns1")})
	if err == nil || !strings.Contains(err.Error(), "refused pod shop/web: no room") {
		t.Errorf("error %v", err)
	}
	p.mu.Lock()
	p.refuse = nil
	p.mu.Unlock()
	if err := s.Add(within(t), Workload{UID: "u1", Name: "web", Namespace: "shop", Netns: stand(t, "ns1")}); err != nil {
		t.Error(err)
	}
}

func TestAddWithoutProxyWaits(t *testing.T) {
	s, _, _ := agent(t)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	err := s.Add(ctx, Workload{UID: "u1", Name: "web", Namespace: "shop", Netns: stand(t, "ns1")})
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "no node proxy is connected") {
		t.Errorf("error %v", err)
	}
	if err := s.Add(t.Context(), Workload{UID: "u2"}); err == nil {
		t.Error("a pod without a network namespace was taken")
	}
}

func TestReconnectAfterTheAgentRestarted(t *testing.T) {
	first, socket, stop := agent(t)
	p := newProxy()
	connect(t, socket, p)
	for _, uid := range []string{"u1", "u2"} {
		if err := first.Add(within(t), Workload{UID: uid, Name: uid, Namespace: "shop", Netns: stand(t, uid)}); err != nil {
			t.Fatal(err)
		}
	}
	stop()
	second := NewServer(zaptest.NewLogger(t))
	second.Keep("u1")
	second.Synced()
	serve(t, second, socket)
	p.heard(t, "add u1 shop/u1  u1", "add u2 shop/u2  u2", "snapshot [u1]")
	p.mu.Lock()
	defer p.mu.Unlock()
	if diff := cmp.Diff(map[string]string{"u1": "u1"}, p.pods); diff != "" {
		t.Errorf("pods left (-want +got):\n%s", diff)
	}
}

func TestTwoProxiesAtOnce(t *testing.T) {
	s, socket, _ := agent(t)
	s.Synced()
	var admitted atomic.Int32
	s.Admit(func(pid int) error {
		if pid != os.Getpid() {
			t.Errorf("peer has pid %d, want %d", pid, os.Getpid())
		}
		admitted.Add(1)
		return nil
	})
	old, young := newProxy(), newProxy()
	stopOld := connect(t, socket, old)
	old.heard(t, "snapshot []")
	stopYoung := connect(t, socket, young)
	young.heard(t, "snapshot []")
	if err := s.Add(within(t), Workload{UID: "u1", Name: "web", Namespace: "shop", Netns: stand(t, "ns1")}); err != nil {
		t.Error(err)
	}
	young.heard(t, "snapshot []", "add u1 shop/web  ns1")
	old.heard(t, "snapshot []")
	if n := len(s.Peers()); n != 2 {
		t.Errorf("%d peers, want 2", n)
	}
	stopYoung()
	// It counts again, and its listeners may have been replaced: it is told of everything.
	old.heard(t, "snapshot []", "add u1 shop/web  ns1")
	young = newProxy()
	connect(t, socket, young)
	young.heard(t, "add u1 shop/web  ns1", "snapshot [u1]")
	stopOld()
	if err := s.Delete(within(t), "u1"); err != nil {
		t.Error(err)
	}
	young.heard(t, "add u1 shop/web  ns1", "snapshot [u1]", "delete u1")
	if n := admitted.Load(); n != 3 {
		t.Errorf("%d proxies were admitted, want 3", n)
	}
}

func TestProxyThatIsNotAdmittedIsToldNothing(t *testing.T) {
	s, socket, _ := agent(t)
	s.Keep("u1")
	s.Synced()
	turnedAway := make(chan struct{}, 8)
	s.Admit(func(int) error {
		turnedAway <- struct{}{}
		return errors.New("it is in no cgroup that is known")
	})
	p := newProxy()
	connect(t, socket, p)
	for range 2 { // and when it comes again
		select {
		case <-turnedAway:
		case <-time.After(10 * time.Second):
			t.Fatal("no proxy came")
		}
	}
	p.heard(t)
	if n := len(s.Peers()); n != 0 {
		t.Errorf("%d peers, want none", n)
	}
}

// TestHostilePeers: whoever does not speak the protocol is disconnected, and nobody else is harmed.
func TestHostilePeers(t *testing.T) {
	s, socket, _ := agent(t)
	s.Synced()
	good := newProxy()
	connect(t, socket, good)
	good.heard(t, "snapshot []")
	netns := stand(t, "ns1")
	for _, tc := range []struct {
		name  string
		speak func(conn *net.UnixConn) error
	}{
		{"no greeting, garbage", func(c *net.UnixConn) error { _, err := c.Write([]byte("\xff\xff\xff\xff")); return err }},
		{"unknown version", func(c *net.UnixConn) error { return send(c, &zds.ZdsHello{Version: 7}, -1) }},
		{"too long", func(c *net.UnixConn) error { _, err := c.Write(make([]byte, maxMessage+1)); return err }},
		{"descriptors nobody asked for", func(c *net.UnixConn) error {
			fd := int(netns.Fd())
			_, _, err := c.WriteMsgUnix([]byte("\xff"), unix.UnixRights(fd, fd, fd, fd, fd, fd, fd, fd, fd, fd), nil)
			return err
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			conn, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: socket, Net: "unixpacket"})
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if err := tc.speak(conn); err != nil {
				t.Fatal(err)
			}
			conn.SetReadDeadline(time.Now().Add(5 * time.Second))
			if n, err := conn.Read(make([]byte, 100)); n != 0 || errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("read %d bytes, %v: want to be disconnected", n, err)
			}
		})
	}
	if n := len(s.Peers()); n != 1 {
		t.Errorf("%d peers, want the good one only", n)
	}
}
