package e2e

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"
)

func denyAccount(namespace, account string) string {
	return fmt.Sprintf(`
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: deny-one, namespace: %[1]s}
spec:
  action: DENY
  selector: {matchLabels: {app: server}}
  rules: [{from: [{source: {principals: [cluster.local/ns/%[1]s/sa/%[2]s]}}]}]
`, namespace, account)
}

// refused waits until a client's new connections are refused, or no longer.
func (w *world) refused(t *testing.T, client string, want bool) {
	t.Helper()
	eventually(t, 5*time.Second, fmt.Sprintf("%s refused: %v", client, want), func() error {
		if a := w.get(t, client, "http://server/"); a.ok() == want {
			return fmt.Errorf("got %v", a)
		}
		return nil
	})
}

func TestDenyStopsTheNamedAccountWithinASecond(t *testing.T) {
	w := newWorld(t, "deny", "alice", "mallory")
	policy := denyAccount(w.namespace, "mallory")

	apply(t, policy) // control: without the mesh the policy stops nobody
	for _, c := range w.clients {
		allOK(t, "outside the mesh, with the policy, "+c, w.client(t, c, "http://server/", "-n", "3"))
	}
	remove(t, policy)
	w.join(t)

	args := []string{"http://server/", "-n", "200", "-interval", "30ms", "-timeout", "2s"}
	alice, mallory := w.start(t, "alice", args...), w.start(t, "mallory", args...)
	apply(t, policy)
	applied := time.Now()
	allOK(t, "alice", alice.wait(t))
	passed, stopped := 0, 0
	for _, a := range mallory.wait(t) {
		switch {
		case a.ok() && a.Time.After(applied.Add(time.Second)):
			t.Errorf("mallory was answered %v after the policy was applied", a.Time.Sub(applied))
		case a.ok():
			passed++
		default:
			stopped++
		}
	}
	if passed == 0 || stopped == 0 {
		t.Errorf("mallory: %d requests passed before the policy, %d were stopped after it: want some of both", passed, stopped)
	}
	remove(t, policy)
	w.refused(t, "mallory", false)
}

func TestDenyAllWithAnAllowChain(t *testing.T) {
	w := newWorld(t, "allow", "alice", "mallory")
	w.join(t)
	for _, c := range w.clients {
		allOK(t, "control: no policy, "+c, w.client(t, c, "http://server/"))
	}
	apply(t, fmt.Sprintf(`
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: deny-all, namespace: %s}
spec: {}
`, w.namespace))
	w.refused(t, "alice", true)
	w.refused(t, "mallory", true)
	apply(t, fmt.Sprintf(`
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: allow-alice, namespace: %[1]s}
spec:
  selector: {matchLabels: {app: server}}
  rules:
  - from: [{source: {principals: [cluster.local/ns/%[1]s/sa/alice]}}]
    to: [{operation: {ports: ["8080"]}}]
`, w.namespace))
	w.refused(t, "alice", false)
	w.refused(t, "mallory", true)
}

func TestStrictRefusesPodsOutsideTheMesh(t *testing.T) {
	w := newWorld(t, "strict", "alice")
	w.join(t)
	outside := newWorld(t, "outside", "stranger")
	url := "http://server." + w.namespace + "/"
	strict := fmt.Sprintf(`
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: %s}
spec: {mtls: {mode: STRICT}}
`, w.namespace)

	allOK(t, "PERMISSIVE by default", outside.client(t, "stranger", url, "-n", "3"))
	apply(t, strict)
	eventually(t, 5*time.Second, "stranger refused", func() error {
		if a := outside.get(t, "stranger", url); a.ok() {
			return fmt.Errorf("got %v", a)
		}
		return nil
	})
	allOK(t, "a pod of the mesh under STRICT", w.client(t, "alice", url, "-n", "3"))
	apply(t, strings.Replace(strict, "STRICT", "PERMISSIVE", 1))
	eventually(t, 5*time.Second, "stranger answered again", func() error {
		if a := outside.get(t, "stranger", url); !a.ok() {
			return fmt.Errorf("got %v", a)
		}
		return nil
	})
}

type condition struct {
	Type, Status, Reason, Message string
	ObservedGeneration            any // Istio writes its 64-bit numbers as strings
}

// conditions reads all conditions of an object, those of an HTTPRoute's parents too.
func conditions(t *testing.T, namespace, kind, name string) []condition {
	t.Helper()
	var o struct {
		Status struct {
			Conditions []condition
			Parents    []struct{ Conditions []condition }
		}
	}
	if err := json.Unmarshal([]byte(kubectl(t, "-n", namespace, "get", kind, name, "-o", "json")), &o); err != nil {
		t.Fatal(err)
	}
	all := o.Status.Conditions
	for _, p := range o.Status.Parents {
		all = append(all, p.Conditions...)
	}
	return all
}

// waitCondition waits for a condition whose message names the culprit.
func waitCondition(t *testing.T, namespace, kind, name, typ, status, inMessage string) {
	t.Helper()
	eventually(t, 5*time.Second, fmt.Sprintf("%s %s is %s=%s", kind, name, typ, status), func() error {
		all := conditions(t, namespace, kind, name)
		for _, c := range all {
			if c.Type == typ && c.Status == status && strings.Contains(c.Message, inMessage) && c.ObservedGeneration != nil {
				return nil
			}
		}
		return fmt.Errorf("conditions %+v", all)
	})
}

func TestInvalidPolicySaysWhatIsWrongAndKeepsTheOldOne(t *testing.T) {
	w := newWorld(t, "invalid", "alice", "mallory")
	w.join(t)
	apply(t, denyAccount(w.namespace, "mallory"))
	w.refused(t, "mallory", true)
	waitCondition(t, w.namespace, "authorizationpolicy", "deny-one", "ZtunnelAccepted", "True", "")

	apply(t, fmt.Sprintf(`
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: deny-one, namespace: %s}
spec:
  action: DENY
  selector: {matchLabels: {app: server}}
  rules: [{from: [{source: {ipBlocks: [not-an-address]}}]}]
`, w.namespace))
	waitCondition(t, w.namespace, "authorizationpolicy", "deny-one", "ZtunnelAccepted", "False", "not-an-address")
	time.Sleep(time.Second)
	w.refused(t, "mallory", true)
	w.refused(t, "alice", false)
}
