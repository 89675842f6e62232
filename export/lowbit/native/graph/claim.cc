// From candidates to regions: what reads real values goes with what makes them, then sets without a way out and back in.
#include "graph/claim.h"

#include <algorithm>
#include <deque>
#include <map>
#include <numeric>
#include <set>

#include "graph/match.h"

namespace lowbit {

namespace {

// Union of sets by their least member.
class Groups {
public:
    explicit Groups(size_t count) : parent_(count) { std::iota(parent_.begin(), parent_.end(), 0); }
    int of(int i) {
        while (parent_[i] != i) i = parent_[i] = parent_[parent_[i]];
        return i;
    }
    void join(int a, int b) {
        a = of(a);
        b = of(b);
        parent_[std::max(a, b)] = std::min(a, b);
    }

private:
    std::vector<int> parent_;
};

class Claimer {
public:
    Claimer(const Graph& graph, const Kernels* kernels) : graph_(graph), matcher_(graph, kernels) {
        candidates_ = matcher_.match();
        is_claimed_.assign(candidates_.size(), true);
    }

    std::vector<Region> claim() {
        if (!has_lut()) return {};
        for (;;) {
            drop_broken();
            if (!has_lut()) return {};
            group();
            if (partition()) break;  // else a group was given up: once more without it
        }
        return regions();
    }

private:
    bool has_lut() const {
        for (size_t i = 0; i < candidates_.size(); ++i)
            if (is_claimed_[i] && candidates_[i].step.conv.is_faster) return true;
        return false;
    }

    // The runtime turns an int8 QuantizeLinear and its DequantizeLinear into uint8, and fuses only what has one type. With
    // one of the two in a region and the other outside, it could not, and would compute what is outside in floats.
    bool cuts_conversion(const Candidate& it) const {
        const auto is_open = [&](int value, auto has_end) {
            if (!matcher_.is_signed(value) || !matcher_.becomes_unsigned(value)) return false;
            for (size_t i = 0; i < candidates_.size(); ++i)
                if (is_claimed_[i] && has_end(candidates_[i], value)) return false;
            return true;
        };
        const auto makes = [](const Candidate& other, int value) { return other.output == value; };
        const auto reads = [](const Candidate& other, int value) {
            return std::find(other.inputs.begin(), other.inputs.end(), value) != other.inputs.end();
        };
        return is_open(it.output, reads) ||
               std::any_of(it.inputs.begin(), it.inputs.end(), [&](int input) { return is_open(input, makes); });
    }

    // Real values stay inside a region: whoever reads one must be claimed, or nobody that does is.
    void drop_broken() {
        for (bool has_changed = true; has_changed;) {
            has_changed = false;
            std::vector<int> owner(graph_.nodes.size(), kNone);
            for (size_t i = 0; i < candidates_.size(); ++i)
                if (is_claimed_[i])
                    for (int node : candidates_[i].nodes) owner[node] = static_cast<int>(i);
            const auto is_inside = [&](int real) {
                const Value& value = graph_.values[real];
                return !value.is_output && value.consumers == static_cast<int>(value.readers.size()) &&
                       std::all_of(value.readers.begin(), value.readers.end(), [&](int node) { return owner[node] != kNone; });
            };
            for (size_t i = 0; i < candidates_.size(); ++i) {
                if (!is_claimed_[i]) continue;
                const Candidate& it = candidates_[i];
                bool is_whole = std::all_of(it.reals.begin(), it.reals.end(), [&](int real) {
                    const int maker = matcher_.reals().at(real).node;
                    return is_inside(real) && (graph_.nodes[maker].op == "DequantizeLinear" || owner[maker] != kNone);
                });
                is_whole = is_whole && (!it.makes_real || is_inside(it.output)) && !cuts_conversion(it);
                if (!is_whole) is_claimed_[i] = false, has_changed = true;
            }
        }
    }

    void group() {
        Groups groups(candidates_.size());
        std::map<int, int> reader, maker;
        for (size_t i = 0; i < candidates_.size(); ++i) {
            if (!is_claimed_[i]) continue;
            if (candidates_[i].makes_real) maker[candidates_[i].output] = static_cast<int>(i);
            for (int real : candidates_[i].reals) {
                const auto first = reader.emplace(real, static_cast<int>(i)).first;
                groups.join(first->second, static_cast<int>(i));
            }
        }
        for (const auto& [real, made_by] : maker)
            if (reader.count(real)) groups.join(reader[real], made_by);
        std::map<int, int> converted;
        for (size_t i = 0; i < candidates_.size(); ++i)
            if (is_claimed_[i] && matcher_.is_signed(candidates_[i].output) && matcher_.becomes_unsigned(candidates_[i].output))
                converted[candidates_[i].output] = static_cast<int>(i);
        for (size_t i = 0; i < candidates_.size(); ++i)
            for (int input : candidates_[i].inputs)
                if (is_claimed_[i] && converted.count(input)) groups.join(converted[input], static_cast<int>(i));
        for (const auto& [a, b] : tied_)
            if (is_claimed_[a] && is_claimed_[b]) groups.join(a, b);
        group_of_node_.assign(graph_.nodes.size(), kNone);
        group_of_.assign(candidates_.size(), kNone);
        for (size_t i = 0; i < candidates_.size(); ++i) {
            if (!is_claimed_[i]) continue;
            group_of_[i] = groups.of(static_cast<int>(i));
            for (int node : candidates_[i].nodes) group_of_node_[node] = group_of_[i];
            for (int real : candidates_[i].reals) {
                const int node = matcher_.reals().at(real).node;
                if (graph_.nodes[node].op == "DequantizeLinear") group_of_node_[node] = group_of_[i];
            }
        }
    }

    // Entities are groups and single nodes. Whatever is ready and not ours is done first, then everything of ours that
    // is ready becomes one set: no path leaves such a set and comes back. False where a group waits for itself.
    bool partition() {
        const int nodes = static_cast<int>(graph_.nodes.size());
        const auto entity = [&](int node) { return group_of_node_[node] == kNone ? node : nodes + group_of_node_[node]; };
        std::map<int, std::set<int>> next;
        std::map<int, int> waits;
        for (int node = 0; node < nodes; ++node) waits.emplace(entity(node), 0);
        for (int node = 0; node < nodes; ++node)
            for (int output : graph_.nodes[node].outputs) {
                if (output == kNone) continue;
                for (int reader : graph_.values[output].readers)
                    if (entity(reader) != entity(node) && next[entity(node)].insert(entity(reader)).second) ++waits[entity(reader)];
            }
        std::deque<int> ours, others;
        const auto push = [&](int it) { (it >= nodes ? ours : others).push_back(it); };
        for (const auto& [it, count] : waits)
            if (count == 0) push(it);
        set_of_group_.assign(candidates_.size(), kNone);
        size_t done = 0;
        int set = 0;
        const auto finish = [&](std::deque<int>& queue) {
            const int it = queue.front();
            queue.pop_front();
            ++done;
            for (int reader : next[it])
                if (--waits[reader] == 0) push(reader);
            return it;
        };
        while (!ours.empty() || !others.empty()) {
            while (!others.empty()) finish(others);
            while (!ours.empty()) set_of_group_[finish(ours) - nodes] = set;
            ++set;
        }
        if (done == waits.size()) return true;
        std::set<int> left;
        for (const auto& [it, count] : waits)
            if (count > 0) left.insert(it);
        return !untie(left, next);
    }

    // Groups that wait for each other through nothing but our own become one; where a foreign node is on the way, a
    // group is given up. True where something changed.
    bool untie(const std::set<int>& left, const std::map<int, std::set<int>>& next) {
        const int nodes = static_cast<int>(graph_.nodes.size());
        bool has_changed = false;
        for (const std::vector<int>& knot : knots(left, next)) {
            if (knot.size() < 2) continue;
            const bool is_ours = std::all_of(knot.begin(), knot.end(), [&](int it) { return it >= nodes; });
            for (int it : knot) {
                if (it < nodes) continue;
                if (is_ours) tied_.emplace_back(knot[0] - nodes, it - nodes);
                else drop_group(it - nodes);
                has_changed = true;
                if (!is_ours) break;
            }
        }
        return has_changed;
    }

    void drop_group(int group) {
        for (size_t i = 0; i < candidates_.size(); ++i)
            if (group_of_[i] == group) is_claimed_[i] = false;
    }

    // Sets of entities that reach each other (Kosaraju: in reverse order of finishing, backward).
    static std::vector<std::vector<int>> knots(const std::set<int>& left, const std::map<int, std::set<int>>& next) {
        std::map<int, std::set<int>> back;
        std::vector<int> order;
        std::set<int> seen;
        const auto walk = [&](int start, const std::map<int, std::set<int>>& edges, std::vector<int>* finished) {
            std::vector<std::pair<int, std::vector<int>>> stack;
            const auto enter = [&](int it) {
                const auto found = edges.find(it);
                stack.emplace_back(it, found == edges.end() ? std::vector<int>{} : std::vector<int>(found->second.begin(), found->second.end()));
            };
            if (!seen.insert(start).second) return;
            for (enter(start); !stack.empty();) {
                if (stack.back().second.empty()) {
                    finished->push_back(stack.back().first);
                    stack.pop_back();
                    continue;
                }
                const int it = stack.back().second.back();
                stack.back().second.pop_back();
                if (left.count(it) && seen.insert(it).second) enter(it);
            }
        };
        for (int it : left) {
            walk(it, next, &order);
            const auto found = next.find(it);
            if (found == next.end()) continue;
            for (int to : found->second)
                if (left.count(to)) back[to].insert(it);
        }
        seen.clear();
        std::vector<std::vector<int>> found;
        for (auto it = order.rbegin(); it != order.rend(); ++it) {
            std::vector<int> knot;
            walk(*it, back, &knot);
            if (!knot.empty()) found.push_back(std::move(knot));
        }
        return found;
    }

    std::vector<Region> regions() {
        Groups groups(candidates_.size());
        std::map<int, int> maker;
        for (size_t i = 0; i < candidates_.size(); ++i)
            if (is_claimed_[i]) maker[candidates_[i].output] = static_cast<int>(i);
        for (size_t i = 0; i < candidates_.size(); ++i) {
            if (!is_claimed_[i]) continue;
            groups.join(static_cast<int>(i), group_of_[i]);
            for (int input : candidates_[i].inputs) {
                const auto made_by = maker.find(input);
                if (made_by != maker.end() && set_of_group_[group_of_[made_by->second]] == set_of_group_[group_of_[i]])
                    groups.join(static_cast<int>(i), made_by->second);
            }
        }
        std::map<int, std::vector<int>> members;
        for (size_t i = 0; i < candidates_.size(); ++i)
            if (is_claimed_[i] && set_of_group_[group_of_[i]] != kNone) members[groups.of(static_cast<int>(i))].push_back(static_cast<int>(i));
        std::vector<Region> found;
        for (const auto& [first, steps] : members)
            if (std::any_of(steps.begin(), steps.end(), [&](int i) { return candidates_[i].step.conv.is_faster; })) {
                Region made = region(steps);
                if (!made.outputs.empty()) found.push_back(std::move(made));  // nobody reads it: no kernel is asked for
            }
        return found;
    }

    const std::string& name(int value) const { return graph_.values[value].name; }

    Port port(int value) const {
        Port made;
        made.name = name(value);
        made.is_signed = matcher_.is_signed(value);
        matcher_.tensor_info(value, &made.info);
        return made;
    }

    Region region(const std::vector<int>& steps) {
        Region made;
        std::set<int> inside, seen, nodes;
        for (int i : steps) {
            inside.insert(candidates_[i].output);
            nodes.insert(candidates_[i].nodes.begin(), candidates_[i].nodes.end());
            for (int real : candidates_[i].reals) nodes.insert(matcher_.reals().at(real).node);
        }
        const auto add_tensor = [&](int value) {
            if (!seen.insert(value).second) return;
            made.tensors.push_back(port(value));
            if (!inside.count(value)) made.inputs.push_back(port(value));
        };
        std::map<std::string, int> uses;
        for (int i : steps) {
            Candidate& it = candidates_[i];
            for (int input : it.inputs) add_tensor(input), it.step.inputs.push_back(name(input)), ++uses[name(input)];
            add_tensor(it.output);
            it.step.output = name(it.output);
            if (is_seen_outside(it, nodes)) made.outputs.push_back(port(it.output));
        }
        for (const Port& out : made.outputs) ++uses[out.name];
        for (int i : steps) made.steps.push_back(std::move(candidates_[i].step));
        fold_clips(&made, uses);
        for (int node : nodes) made.nodes.push_back(graph_.nodes[node].handle);
        return made;
    }

    bool is_seen_outside(const Candidate& it, const std::set<int>& nodes) const {
        if (it.makes_real) return false;
        const Value& value = graph_.values[it.output];
        return value.is_output || value.consumers != static_cast<int>(value.readers.size()) ||
               std::any_of(value.readers.begin(), value.readers.end(), [&](int node) { return !nodes.count(node); });
    }

    // A Clip that alone reads a convolution or a sum becomes its range of codes.
    static void fold_clips(Region* region, const std::map<std::string, int>& uses) {
        std::map<std::string, size_t> maker;
        std::vector<Step> kept;
        for (Step& step : region->steps) {
            const auto made_by = maker.find(step.inputs[0]);
            const bool is_clip = step.kind == OpKind::kMap && is_clip_table(step.table);
            if (is_clip && made_by != maker.end() && uses.at(step.inputs[0]) == 1) {
                Step& before = kept[made_by->second];
                int& low = before.kind == OpKind::kAdd ? before.add.low : before.conv.requantize.low;
                int& high = before.kind == OpKind::kAdd ? before.add.high : before.conv.requantize.high;
                const int at_least = step.table[0], at_most = step.table[255];
                low = std::min(std::max(low, at_least), at_most);
                high = std::min(std::max(high, at_least), at_most);
                before.output = step.output;
                maker[step.output] = made_by->second;
                continue;
            }
            if (step.kind == OpKind::kLutConv || step.kind == OpKind::kDotConv || step.kind == OpKind::kAdd)
                maker[step.output] = kept.size();
            kept.push_back(std::move(step));
        }
        region->steps = std::move(kept);
    }

    static bool is_clip_table(const std::array<uint8_t, 256>& table) {
        for (int i = 0; i < 256; ++i)
            if (table[i] != std::min<int>(std::max<int>(i, table[0]), table[255])) return false;
        return true;
    }

    const Graph& graph_;
    Matcher matcher_;
    std::vector<Candidate> candidates_;
    std::vector<bool> is_claimed_;
    std::vector<int> group_of_, group_of_node_, set_of_group_;
    std::vector<std::pair<int, int>> tied_;  // candidates that must go together
};

}  // namespace

std::vector<Region> claim(const Graph& graph, const Kernels* kernels) { return Claimer(graph, kernels).claim(); }

}  // namespace lowbit
