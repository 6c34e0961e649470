package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// session starts `box tcp` in a client pod: exchanges on one connection, each compared, until it is stopped.
func (w *world) session(t *testing.T, pod, address string, args ...string) *background {
	t.Helper()
	return w.startBox(t, pod, append([]string{"tcp", address, "-timeout", "20s"}, args...)...)
}

// rollout replaces the node proxies as an administrator does, and waits until the former ones are gone.
func rollout(t *testing.T) {
	t.Helper()
	kubectl(t, "-n", "istio-system", "rollout", "restart", "daemonset/ztunnel")
	rolledOut(t)
}

// rolledOut waits until all node proxies are of the newest kind.
func rolledOut(t *testing.T) {
	t.Helper()
	eventually(t, 4*time.Minute, "the rollout is complete", func() error {
		_, err := command(time.Minute, nil, "kubectl", "-n", "istio-system", "rollout", "status", "daemonset/ztunnel", "--timeout=20s")
		return err
	})
	eventually(t, 60*time.Second, "the former proxies are gone", func() error {
		if pods := strings.Fields(kubectl(t, "-n", "istio-system", "get", "pods", "-l", "app=ztunnel", "-o", "name")); len(pods) != len(nodes) {
			return fmt.Errorf("%v", pods)
		}
		return nil
	})
}

// TestRolloutCutsNothing: bulk, ping-pong and idle sessions through a tunnel, within a node and out of the mesh live
// through kubectl rollout restart of ztunnel, and no request made meanwhile fails. TestKilledProxyLeaksNothingAndComesBack
// is its control.
func TestRolloutCutsNothing(t *testing.T) {
	outside := newWorld(t, "rollout-outside")
	w := newWorld(t, "rollout", "alice")
	near := strings.NewReplacer("server-v1", "near", "{app: server, version: v1}", "{app: near}", "nodeName: node2", "nodeName: node1")
	apply(t, near.Replace(fmt.Sprintf(serverManifest, w.namespace, "v1")))
	kubectl(t, "-n", w.namespace, "wait", "--for=condition=Ready", "pod", "near", "--timeout=90s")
	w.join(t)
	sessions, idle := map[string]*background{}, map[string]*background{}
	for way, address := range map[string]string{
		"tunnel":    "server:9090",
		"same node": w.podIP(t, "near") + ":9090",
		"plain":     outside.podIP(t, "server-v1") + ":9090",
	} {
		sessions[way+", bulk"] = w.session(t, "alice", address, "-n", "0", "-size", "4000000", "-interval", "100ms")
		sessions[way+", ping-pong"] = w.session(t, "alice", address, "-n", "0", "-size", "64", "-interval", "20ms")
		idle[way+", idle"] = w.session(t, "alice", address, "-n", "2", "-interval", "60s")
	}
	load := w.start(t, "alice", "http://server/", "-n", "0", "-concurrency", "2", "-interval", "10ms", "-timeout", "20s")
	time.Sleep(2 * time.Second)
	began := time.Now()
	rollout(t)
	ended := time.Now()
	t.Logf("the rollout took %v", ended.Sub(began))
	time.Sleep(2 * time.Second)

	for name, b := range sessions {
		_ = b.cmd.Process.Kill()
		_ = b.cmd.Wait()
		w.judge(t, name, parseWhole(t, b.out.text.String()), ended)
	}
	_ = load.cmd.Process.Kill()
	_ = load.cmd.Wait()
	answers := parseWhole(t, load.out.text.String())
	during := 0
	for _, a := range answers {
		if !a.ok() {
			t.Errorf("a request %v after the rollout began: %v", a.Time.Sub(began), a)
		}
		if a.Time.After(began) && a.Time.Before(ended) {
			during++
		}
	}
	t.Logf("%d requests, each on a connection of its own, %d of them during the rollout", len(answers), during)
	if during < 50 {
		t.Errorf("only %d requests during the rollout", during)
	}
	for name, b := range idle {
		if got := b.wait(t); len(got) != 2 {
			t.Errorf("%s: %v", name, got)
		} else {
			w.judge(t, name, got, ended)
		}
	}
}

// judge wants all exchanges of a session to have succeeded, and some after the rollout.
func (w *world) judge(t *testing.T, name string, got []answer, ended time.Time) {
	t.Helper()
	after := 0
	for _, a := range got {
		if a.Error != "" || a.Local != got[0].Local {
			t.Errorf("%s, exchange %d at %v: %s", name, a.N, a.Time, a.Error)
		}
		if a.Time.After(ended) {
			after++
		}
	}
	t.Logf("%s: %d exchanges, %d after the rollout", name, len(got), after)
	if after == 0 {
		t.Errorf("%s: no exchange after the rollout", name)
	}
}

// parseWhole parses the lines of a program that was stopped, maybe in the middle of one.
func parseWhole(t *testing.T, out string) []answer {
	t.Helper()
	return parse(t, out[:strings.LastIndexByte(out, '\n')+1])
}
